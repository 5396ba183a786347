"""The nine published experiments, small: real tokenizers, real pairs, real architectures."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from denserl_cli.core.chat.loading import load_tokenizer
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import Recipe
from denserl_cli.core.stages.run import run_stage
from tests import SHARED

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
SIZES = (
    "data.eval_pairs=2",
    "data.eval_prompts=2",
    "data.max_length=128",
    "data.max_prompt_length=64",
    "reward_model.batch_size=4",
    "reward_model.micro_batch_size=4",
    "normalizer.pairs=10",
    "ppo.iterations=1",
    "ppo.rollout.batch_size=4",
    "ppo.train_batch_size=4",
    "ppo.micro_batch_size=4",
    "ppo.max_prompt_length=48",
    "ppo.rollout.max_new_tokens=8",
)
BACKBONES = {"phi3": "phi3-mini", "llama3.1": "llama3.1", "llama3-sft": "llama3"}
STOPS = {
    "phi3": [32007, 32000],
    "llama3.1": [128009, 128001, 128008],
    "llama3-sft": [128009, 128001],
}
STAGES = ("train-rm", "fit-function", "train-ppo")
LOADED = lru_cache(load_tokenizer)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longest here: a tokenizer is read once for all stages, nothing is plotted."""
    monkeypatch.setattr("denserl_cli.core.chat.loading.load_tokenizer", LOADED)
    monkeypatch.setattr("denserl_cli.core.stages.fit_function.plot", lambda *_: None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real preference pairs."""
    source = SHARED / "data" / "preferences" / "train.jsonl"
    if not source.exists():
        pytest.skip(f"no shared fixtures at {source}")
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with source.open(encoding="utf-8") as lines:
        file.write_text("".join(islice(lines, 14)), encoding="utf-8")
    return file


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has it: the architecture with tiny random weights, the real tokenizer."""
    name = BACKBONES[request.param]
    tokenizers = SHARED / "tokenizers"
    if not tokenizers.exists():
        pytest.skip(f"no shared fixtures at {tokenizers}")
    folder = tmp_path_factory.mktemp("hub") / request.param
    folder.mkdir()
    for file in (tokenizers / name).iterdir():
        shutil.copyfile(file, folder / file.name)
    torch.manual_seed(0)
    if name == "phi3-mini":
        ids = {"pad_token_id": 32000, "bos_token_id": 1, "eos_token_id": 32000}
        model = Phi3ForCausalLM(Phi3Config(vocab_size=32064, **SHAPE, **ids))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, **SHAPE))
    model.save_pretrained(folder)
    return folder


def sized(name: str, backbone: Path, pairs: Path) -> Recipe:
    """A shipped recipe with local files and small sizes."""
    here = [f"model.path={backbone}", f"data.preferences=[{pairs}]", f"data.prompts=[{pairs}]"]
    return load_recipe(name, [*here, *SIZES])


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_a_published_recipe_runs_all_its_stages(
    granularity: str, backbone: Path, pairs: Path, tmp_path: Path
):
    recipe = sized(f"{backbone.name}-{granularity}", backbone, pairs)
    for stage in STAGES:
        run_stage(stage, recipe, tmp_path / "run", "start", Observer())

    book = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {stage: book["stages"][stage]["status"] for stage in STAGES} == {
        stage: "finished" for stage in STAGES
    }
    ids = torch.arange(8)[None]
    reward_model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "reward_model"
    )
    assert reward_model(ids).logits.shape == (1, 1)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert policy(ids).logits.isfinite().all()
    assert policy.generation_config.eos_token_id == STOPS[backbone.name]
    record = json.loads((tmp_path / "run" / "reward_model" / "denserl.json").read_text())
    assert record["granularity"] == granularity
    assert record["terminator_id"] == STOPS[backbone.name][0]


def test_the_published_pair_needs_no_training(backbone: Path, pairs: Path, tmp_path: Path):
    """PPO starts from a published reward model and its published coefficients."""
    torch.manual_seed(1)
    reward_model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    folder = tmp_path / "published"
    reward_model.save_pretrained(folder)
    recipe = load_recipe(
        f"{backbone.name}-segment",
        [
            f"model.path={backbone}",
            f"data.prompts=[{pairs}]",
            f"published.reward_model={folder}",
            *SIZES,
        ],
    )

    run_stage("train-ppo", recipe, tmp_path / "run", "start", Observer())

    normalizer = json.loads((tmp_path / "run" / "reward_model" / "normalizer.json").read_text())
    assert recipe.published and recipe.published.normalizer
    for name in ("w_mean", "w_std", "b_mean", "b_std"):
        assert normalizer[name] == getattr(recipe.published.normalizer, name)
    assert (tmp_path / "run" / "policy" / "config.json").exists()
