"""Tiny models and a tiny run of the sandbox, for the tests that need something to work on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from denserl_cli.core.engine.frozen import LocalModel
from denserl_cli.core.models.causal_lm import StreamedHead
from denserl_cli.core.models.scalar_head import ScalarHead
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.sampling.sampler import Sampler
from denserl_cli.core.sampling.torch_engine import TorchSampling
from denserl_cli.core.stages.run import run_stage

SETTINGS = (
    "sandbox.phrases=4",
    "sandbox.phrase_length=3",
    "sandbox.response_phrases=4",
    "sandbox.pairs=80",
    "sandbox.hidden_size=32",
    "sandbox.layers=1",
    "sandbox.fit_steps=150",
    "segmentation.cutoff=1.0",
    "data.eval_pairs=4",
    "data.eval_prompts=2",
    "reward_model.batch_size=8",
    "reward_model.micro_batch_size=8",
    "reward_model.epochs=1",
    "normalizer.pairs=40",
    "ppo.iterations=4",
    "ppo.rollout.batch_size=4",
    "ppo.train_batch_size=4",
    "ppo.micro_batch_size=4",
    "ppo.rollout.max_new_tokens=20",
    "ppo.missing_eos_penalty=null",
    "ppo.eval_every=2",
    "ppo.save_every=2",
)
"""What makes `sandbox-segment` a matter of seconds."""


def words(*settings: str) -> list[str]:
    """`SETTINGS` and more of the kind as command-line words."""
    return [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]


def recipe(*settings: str) -> Recipe:
    """The tiny sandbox recipe with further settings."""
    return load_recipe("sandbox-segment", [*SETTINGS, *settings])


def make_run(folder: Path) -> None:
    """Train a tiny reward model and fit its normaliser."""
    for stage in ("train-rm", "fit-function"):
        run_stage(stage, recipe(), folder, "start", Observer())


def pretend(folder: Path, made_for: Recipe) -> None:
    """Make the reward model and the normaliser of a run folder say they belong to a recipe."""
    run = RunFolder(folder, made_for)
    cut = {
        "granularity": made_for.segmentation.granularity,
        "cutoff": made_for.segmentation.cutoff,
    }
    record = run.reward_model / "denserl.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **cut}))
    slope = 0.2 if made_for.normalizer.kind == "location" else 0.0
    normalizer = LocationNormalizer(slope, slope, 0.1, 1.5)
    normalizer.save(run.normalizer, {"kind": made_for.normalizer.kind, **cut})


def config(vocabulary: int = 20, hidden: int = 16, layers: int = 2) -> LlamaConfig:
    """A Llama whose random weights have an opinion."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def causal_lm(seed: int = 0, tied: bool = False, **shape: int) -> LlamaForCausalLM:
    """A language model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    settings = config(**shape)
    settings.tie_word_embeddings = tied
    model = LlamaForCausalLM(settings).eval()
    StreamedHead.take_over(model)
    return model


def scalar_model(seed: int = 0, **shape: int) -> LlamaForSequenceClassification:
    """A model with a scalar head and random weights, in evaluation mode."""
    torch.manual_seed(seed)
    settings = config(**shape)
    settings.num_labels = 1
    model = LlamaForSequenceClassification(settings).eval()
    ScalarHead.take_over(model)
    return model


def frozen(model: torch.nn.Module) -> LocalModel:
    """A model as a scorer holds it, in float32."""
    return LocalModel(model, torch.float32)


def sampler(model, rows: int | None = None, pad_id: int = 0) -> Sampler:
    """A sampler of a model in float32."""
    return Sampler(TorchSampling(frozen(model), rows=rows, pad_id=pad_id))
