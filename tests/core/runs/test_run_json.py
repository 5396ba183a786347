"""run.json: its bytes, folders that earlier versions wrote, and files that are damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.runs.run_json import RunJson

STAGE = "train-rm"
READ_BY_STAGE = (
    *("name", "seed", "sandbox", "model", "lora", "chat", "segmentation"),
    *("data.preferences", "data.evaluation", "data.eval_pairs", "data.max_length"),
    *("data.max_prompt_length", "data.strict", "optimizer", "reward_model"),
)
MEMORY = ("model.gradient_checkpointing", "reward_model.micro_batch_size")
FORM = """\
{
  "schema": 1,
  "recipe": "sandbox-segment",
  "stages": {
    "train-rm": {
      "status": "STATUS",
      "settings": SETTINGS,
      "versions": {
        "denserl": "0.1.0",
        "torch": "2.13.0"
      },
      "processes": 1,
      "device": "CPU"
    }
  }
}
"""
"""What version 0.1.0 wrote, to the byte; SETTINGS is indented like the rest."""


def recipe(*settings: str) -> Recipe:
    return load_recipe("sandbox-segment", ["optimizer.betas=[0.9, 0.99]", *settings])


def old_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of train-rm as version 0.1.0 recorded them."""
    named: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(child, f"{name}.{key}".removeprefix("."))
        elif any(name == part or name.startswith(f"{part}.") for part in READ_BY_STAGE):
            named[name] = list(value) if isinstance(value, tuple) else value

    walk(asdict(recipe), "")
    return named


def old_text(recipe: Recipe, status: str = "interrupted") -> str:
    settings = json.dumps(old_settings(recipe), indent=2).replace("\n", "\n" + 6 * " ")
    return FORM.replace("STATUS", status).replace("SETTINGS", settings)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run folder of version 0.1.0: train-rm was interrupted after step 2."""
    (tmp_path / "run.json").write_text(old_text(recipe()))
    lines = [json.dumps({"stage": STAGE, "step": step, "loss": 0.5}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    deciding = {
        key: value
        for key, value in old_settings(recipe()).items()
        if value is not None and key not in MEMORY
    }
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    state = {
        "schema": 1,
        "step": 2,
        "settings": digest,
        "versions": {"denserl": "0.1.0", "torch": "2.0", "transformers": "5.0", "numpy": "2.0"},
        "state": {"weights": torch.ones(3)},
        "files": [],
    }
    checkpoint = tmp_path / "checkpoints" / STAGE / "step-00000002"
    checkpoint.mkdir(parents=True)
    torch.save(state, checkpoint / "state.pt")
    return tmp_path


def test_a_folder_of_an_earlier_version_is_resumed(old: Path):
    run = RunFolder(old, recipe("reward_model.micro_batch_size=2"))
    with pytest.raises(DenserlError, match="was interrupted"):
        run.admit(STAGE, "start")
    assert run.admit(STAGE, "resume")
    checkpoint = run.started(STAGE, "resume", Observer())
    assert checkpoint is not None and checkpoint.step == 2
    assert checkpoint.state["weights"].tolist() == [1, 1, 1]
    assert [line["step"] for line in run.metrics(STAGE)] == [1, 2]
    run.finished(STAGE, {"steps": 4})
    again = RunFolder(old, recipe())
    assert not again.admit(STAGE, "start") and again.summary(STAGE) == {"steps": 4}


def test_a_folder_of_an_earlier_version_under_other_settings_is_refused(old: Path):
    before = (old / "run.json").read_bytes()
    with pytest.raises(DenserlError, match=r"settings: reward_model\.epochs was 2\.0, is 3\.0"):
        RunFolder(old, recipe("reward_model.epochs=3")).admit(STAGE, "resume")
    assert (old / "run.json").read_bytes() == before


def test_the_form_of_the_file_has_not_changed(tmp_path: Path, monkeypatch):
    folder = "denserl_cli.core.runs.folder"
    made_with = {"denserl": "0.1.0", "torch": "2.13.0"}
    monkeypatch.setattr(f"{folder}.versions", lambda: made_with)
    monkeypatch.setattr(f"{folder}.device_name", lambda: "CPU")
    run = RunFolder(tmp_path, recipe())
    run.started(STAGE, "start", Observer())
    assert (tmp_path / "run.json").read_text() == old_text(recipe())
    run.finished(STAGE, {"steps": 4})
    finished = old_text(recipe(), "finished").replace(
        '"device": "CPU"', '"device": "CPU",\n      "summary": {\n        "steps": 4\n      }'
    )
    assert (tmp_path / "run.json").read_text() == finished


def test_what_other_versions_have_added_stays(tmp_path: Path):
    file = tmp_path / "run.json"
    content = {"schema": 1, "recipe": "sandbox-segment", "stages": {}, "note": "kept"}
    file.write_text(json.dumps(content))
    RunJson.read(file).write()
    assert json.loads(file.read_text()) == content


@pytest.mark.parametrize(
    "content",
    [
        *(b"{", b"[]", b"{}", b'{"recipe": "sandbox-segment"}', b"\xff\xfe", b""),
        b'{"schema": 1, "recipe": "sandbox-segment", "stages": []}',
        b'{"schema": 1, "recipe": "sandbox-segment", "stages": {"train-rm": 3}}',
    ],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, content: bytes):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(DenserlError, match=r"run\.json is damaged"):
        RunFolder(tmp_path, recipe())
    assert (tmp_path / "run.json").read_bytes() == content


def test_another_schema_is_refused(tmp_path: Path):
    content = '{"schema": 99, "recipe": "sandbox-segment", "stages": {}}'
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DenserlError, match="schema 99, this version reads 1"):
        RunFolder(tmp_path, recipe())
