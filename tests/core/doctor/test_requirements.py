"""What of a recipe is on this machine, in a cache made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from denserl_cli.core.doctor.requirements import recipe_needs
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.runs import trackers

MODEL = "microsoft/Phi-3-mini-4k-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    return tmp_path


def snapshot(cache: Path, kind: str, name: str, *files: str) -> Path:
    repository = cache / f"{kind}--{name.replace('/', '--')}"
    folder = repository / "snapshots" / "abc"
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("abc")
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_gpus_that_nobody_recorded_are_no_published_fact(cache: Path):
    assert not any(line.startswith("GPUs") for line in recipe_needs("qwen3-segment").missing)
    assert any(
        "8 in the published training" in line for line in recipe_needs("phi3-segment").missing
    )


def test_a_sandbox_needs_nothing():
    for name in ("sandbox-segment", "sandbox-token", "sandbox-bandit"):
        assert recipe_needs(name).missing == []


def test_what_is_not_downloaded_is_missing(cache: Path):
    missing = recipe_needs("llama3.1-segment").missing
    assert "model meta-llama/Llama-3.1-8B-Instruct: not downloaded, licence to accept" in missing
    assert "data hendrydong/preference_700K: not downloaded" in missing
    assert any(line.startswith("published reward model yyqoni/") for line in missing)
    assert any(line.startswith("GPUs: 8 in the published training") for line in missing)


def test_a_model_is_here_when_every_part_of_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def state() -> list[str]:
        return [line for line in recipe_needs("phi3-segment").missing if line.startswith("model ")]

    folder = snapshot(cache, "models", MODEL, "config.json")
    assert state() == [f"model {MODEL}: downloaded in part"]
    parts = ["model-1.safetensors", "model-2.safetensors"]
    index = {"weight_map": {"a": parts[0], "b": parts[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / parts[0]).write_text("")
    assert state() == [f"model {MODEL}: downloaded in part"]
    (folder / parts[1]).write_text("")
    assert state() == [] and f"model {MODEL}" in recipe_needs("phi3-segment").here


def test_data_is_here_downloaded_or_prepared(cache: Path):
    snapshot(cache, "datasets", "hendrydong/preference_700K")
    (cache / "prepared" / "argilla___ultrafeedback-binarized-preferences-cleaned").mkdir(
        parents=True
    )
    found = recipe_needs("phi3-token")
    assert "data hendrydong/preference_700K" in found.here
    assert not any(line.startswith("data ") for line in found.missing)


def test_a_recipe_of_ones_own_names_its_folders(cache: Path, tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    (tmp_path / "pairs.jsonl").write_text("")
    mine.write_text(
        f"model: {{path: {tmp_path}}}\nsegmentation: {{cutoff: 1.0}}\n"
        f"data: {{preferences: [{tmp_path}/pairs.jsonl], prompts: [some/prompts]}}\n"
        "lora: {quantize: true}\n"
    )
    found = recipe_needs(str(mine))
    assert found.here == [f"model {tmp_path}", f"data {tmp_path / 'pairs.jsonl'}"]
    assert found.missing[0] == "data some/prompts: not downloaded"
    with pytest.raises(DenserlError):
        recipe_needs("no-such-recipe")


def test_what_a_recipe_asks_for_beside_model_and_data(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else name)
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: phi3-segment\nrun: {trackers: [tensorboard, wandb]}\n"
        "model: {tokenizer: some/tokenizer, attention: flash_attention_2}\n"
        "published: {policy: some/policy}\n"
    )
    missing = recipe_needs(str(mine)).missing
    assert "tokenizer some/tokenizer: not downloaded" in missing
    assert "published policy some/policy: not downloaded" in missing
    assert "model.attention: flash_attention_2 is not usable here" in missing
    assert missing[-1].startswith("run.trackers asks for wandb, which is not installed: pip ")
    snapshot(cache, "models", "some/tokenizer", "tokenizer.json")
    assert "tokenizer some/tokenizer" in recipe_needs(str(mine)).here
