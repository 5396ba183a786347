"""denserl doctor."""

from __future__ import annotations

import json

import pytest
from click.testing import Result
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.doctor import checks as diagnosis
from denserl_cli.core.errors import DenserlError


def doctor(*words: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *words])


def test_everything_is_in_the_tables_and_in_json():
    shown, told = doctor(), doctor("--json")
    assert shown.exit_code == told.exit_code == 0, shown.exception
    document = json.loads(told.stdout)
    assert set(document) == {"sections", "broken", "recipes"}
    for title, facts in document["sections"].items():
        assert title in shown.stdout
        assert all(name in shown.stdout for name in facts)
    assert all(one["recipe"] in shown.stdout for one in document["recipes"])
    assert len(document["recipes"]) > 10


def test_one_recipe_alone():
    document = json.loads(doctor("--json", "--recipe", "sandbox-token").stdout)
    assert document["recipes"] == [{"recipe": "sandbox-token", "here": [], "missing": []}]
    assert isinstance(doctor("-r", "no-such").exception, DenserlError)


def test_what_is_broken_ends_with_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis, "_broken", lambda: iter(["torch is not installed"]))
    result = doctor("-r", "sandbox-token")
    assert "sandbox-token" in result.stdout
    assert isinstance(result.exception, DenserlError) and result.exception.exit_code == 2
    assert "torch is not installed" in result.exception.message
