"""denserl doctor's facts: all of them, whatever is broken, and none that are private."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from denserl_cli.core.doctor import checks as diagnosis
from denserl_cli.core.doctor.checks import PROBES, diagnose
from denserl_cli.core.system.environment import versions


def test_it_looks_at_everything():
    found = diagnose(["sandbox-segment"])
    assert list(found.sections) == list(PROBES) and found.broken == []
    assert found.sections["versions"].items() >= versions().items()
    assert "GiB free of" in found.sections["machine"]["memory"]
    assert found.sections["attention"]["model.attention: auto is"] in ("sdpa", "flash_attention_2")
    assert not any("failed" in facts for facts in found.sections.values())
    assert [(one.recipe, one.missing) for one in found.recipes] == [("sandbox-segment", [])]


def test_a_probe_that_fails_is_a_fact_itself(monkeypatch: pytest.MonkeyPatch):
    def half() -> Iterator[tuple[str, str]]:
        yield "first", "known"
        raise RuntimeError("libcuda is broken\nmore of it")

    def quarrelsome(name: str) -> None:
        raise ImportError("no torch")

    monkeypatch.setattr(diagnosis, "PROBES", {"GPUs": half})
    monkeypatch.setattr(diagnosis, "recipe_needs", quarrelsome)
    found = diagnose(["sandbox-segment"])
    expected = {"first": "known", "failed": "RuntimeError: libcuda is broken"}
    assert found.sections["GPUs"] == expected
    assert found.recipes[0].missing == ["could not be examined: ImportError: no torch"]


def test_nothing_private_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home" / "someone"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "hf_secret")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "node17")
    place = tmp_path / "data" / "alice" / "node17"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    (home / "model").mkdir()
    (place / "pairs.jsonl").write_text("")
    recipe = home / "mine.yaml"
    recipe.write_text(
        f"model: {{path: {home}/model}}\nsegmentation: {{cutoff: 1.0}}\n"
        f"data: {{preferences: [{place}/pairs.jsonl], prompts: [a/b]}}\n"
    )
    redact = json.dumps(asdict(diagnose([str(recipe)])))
    for word in ("secret", str(home), "alice", "node17"):
        assert word not in redact
    assert "model ~/model" in redact and "/data/USER/HOST" in redact
    for fact in ("token", "HF_HUB_OFFLINE"):
        assert f'"{fact}": "set"' in redact
    assert '"TRANSFORMERS_OFFLINE": "1"' in redact


@pytest.mark.parametrize("home", ["/", "", "relative", None])
def test_a_home_that_is_none_hides_nothing(home: str | None, monkeypatch: pytest.MonkeyPatch):
    def nobody(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(getpass, "getuser", lambda: nobody(0))
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert diagnosis.redactor()("/data/a b/relative ~") == "/data/a b/relative ~"


def test_a_user_is_taken_out_wherever_the_name_stands_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "al.x")
    redact = diagnosis.redactor()
    assert redact("(/data/al.x) al.x's al.x. al.x:") == "(/data/USER) USER's USER. USER:"
    assert redact("al.x.y al.x-1 pal.x alyx") == "al.x.y al.x-1 pal.x alyx"


@pytest.mark.parametrize(
    ("requirement", "words"),
    [("no-such-library>=1", "no-such-library is not installed"),
     ("numpy>=999", "is installed, >=999 is needed"),
     ("no-such-library; extra == 'qlora'", None),
     ("no-such-library; sys_platform == 'beos'", None)],
)  # fmt: skip
def test_what_denserl_cannot_do_without(
    requirement: str, words: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(diagnosis.metadata, "requires", lambda _: [requirement])
    assert [words in line for line in diagnosis._broken()] == ([True] if words else [])


@pytest.mark.parametrize(
    ("answer", "words"),
    [(FileNotFoundError(), "no nvidia-smi"),
     (PermissionError(), "nvidia-smi failed: PermissionError"),
     (subprocess.TimeoutExpired("nvidia-smi", 5), "nvidia-smi failed: TimeoutExpired"),
     (subprocess.CompletedProcess([], 9, "broken", ""), "nvidia-smi failed with exit code 9"),
     (subprocess.CompletedProcess([], 0, "595.1\n595.1\n", ""), "595.1")],
)  # fmt: skip
def test_the_driver_says_its_version_or_why_not(answer: object, words: str, monkeypatch):
    def run(*_: object, **__: object) -> object:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(subprocess, "run", run)
    assert diagnosis._driver() == words
