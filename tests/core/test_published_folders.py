"""Reward models and policies in the shapes in which others publish them, and the hub's refusals."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
)

from denserl_cli.core.chat.loading import load_tokenizer
from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import load_causal_lm
from denserl_cli.core.models.scalar_head import load_scalar_model, token_values
from denserl_cli.core.models.sequence_classifier import check_head
from denserl_cli.core.recipe.schema import ModelConfig

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "llama": (LlamaConfig, LlamaForSequenceClassification, LlamaForCausalLM),
    "phi3": (Phi3Config, Phi3ForSequenceClassification, Phi3ForCausalLM),
}
SHARDS = {"plain": "1GB", "sharded": "10KB"}


def made(name: str, *, scalar: bool = True) -> Any:
    """A random model of an architecture, whose weights bfloat16 can hold."""
    config, classifier, causal = CLASSES[name]
    torch.manual_seed(3)
    model = classifier(config(**SHAPE, num_labels=1)) if scalar else causal(config(**SHAPE))
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model.eval()


def publish(model: Any, folder: Path, *, shard: str = "1GB") -> Path:
    """Write a model as the authors did: bfloat16, and a config that speaks of code of theirs."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder, max_shard_size=shard)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name in ("num_labels", "id2label", "label2id", "problem_type"):
        config.pop(name, None)
    config["architectures"] = ["RewardModel"]
    config["auto_map"] = {
        "AutoConfig": "configuration_absent.AbsentConfig",
        "AutoModel": "somebody/absent--modeling_absent.RewardModel",
        "AutoModelForSequenceClassification": "modeling_absent.RewardModel",
        "AutoModelForCausalLM": "modeling_absent.Policy",
    }
    file.write_text(json.dumps({**config, "normalize_reward": False}))
    return folder


def change_weights(folder: Path, **weights: torch.Tensor | None) -> None:
    """Add tensors to a folder of one file, or take them away."""
    file = folder / "model.safetensors"
    kept = load_file(file) | {name.replace("__", "."): w for name, w in weights.items()}
    save_file({n: w for n, w in kept.items() if w is not None}, file, metadata={"format": "pt"})


def loaded(folder: Path) -> Any:
    return load_scalar_model(ModelConfig(str(folder)), fresh_head=False, trained=False)


def check_values(source: Any, found: Any) -> None:
    """The values at every token are those that the source's own modules give."""
    prompts, responses = [[3, 4, 5], [6]], [[7, 8, 9, 2], [10, 2]]
    with torch.no_grad():
        values = token_values(found, collate_sequences(prompts, responses, 0))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            states = source.model(torch.tensor([prompt + response])).last_hidden_state
            expected = source.score(states)[0, len(prompt) :, 0]
            torch.testing.assert_close(values[row, : len(response)], expected)
    assert values.abs().max() > 0.1


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_reward_model_written_the_authors_way(name: str, shard: str, tmp_path: Path):
    source = made(name)
    folder = publish(source, tmp_path / "rm", shard=SHARDS[shard])
    assert (folder / "model.safetensors.index.json").exists() == (shard == "sharded")
    check_values(source, loaded(folder))
    assert not [module for module in sys.modules if "_absent" in module]


@pytest.mark.parametrize("name", CLASSES)
def test_what_else_lies_in_the_file_is_left_alone(name: str, tmp_path: Path):
    source = made(name)
    folder = publish(source, tmp_path / "rm")
    extra = {"mean": torch.ones(1), "std": torch.ones(1), "lm_head__weight": torch.ones(40, 16)}
    change_weights(folder, **extra)
    check_values(source, loaded(folder))


def test_the_older_format_of_weights_loads_too(tmp_path: Path):
    source = made("llama")
    folder = publish(source, tmp_path / "rm")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({name: w.bfloat16() for name, w in source.state_dict().items()}, file)
    check_values(source, loaded(folder))
    for size in (3000, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(DenserlError, match="cannot load the reward model"):
            loaded(folder)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_published_policy(name: str, shard: str, tmp_path: Path):
    source = made(name, scalar=False)
    folder = publish(source, tmp_path / "policy", shard=SHARDS[shard])
    policy = load_causal_lm(ModelConfig(str(folder)), trained=False)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(policy(ids).logits, source(ids).logits)


@pytest.mark.parametrize(
    "head",
    [
        {"score__weight": None},
        {"score__weight": torch.ones(2, 16)},
        {"score__weight": torch.ones(1, 8)},
        {"score__weight": None, "classifier__weight": torch.ones(1, 16)},
        {"score__weight": None, "value_head__weight": torch.ones(1, 16)},
    ],
)
@pytest.mark.parametrize("name", CLASSES)
def test_a_head_that_does_not_fit_is_never_made_up(
    name: str, head: dict[str, torch.Tensor | None], tmp_path: Path
):
    folder = publish(made(name), tmp_path / "rm")
    change_weights(folder, **head)
    with pytest.raises(DenserlError, match=r"lacks weights of the reward model.*score\.weight"):
        loaded(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_a_bias_that_would_be_left_out_is_refused(name: str, tmp_path: Path):
    folder = publish(made(name), tmp_path / "rm")
    change_weights(folder, score__bias=torch.ones(1))
    with pytest.raises(DenserlError, match=rf"not part of the {name} model .*: score\.bias"):
        loaded(folder)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_missing_head_is_seen_without_loading_weights(shard: str, tmp_path: Path):
    check_head(str(publish(made("llama"), tmp_path / "rm", shard=SHARDS[shard])))
    policy = publish(made("llama", scalar=False), tmp_path / "policy", shard=SHARDS[shard])
    with pytest.raises(DenserlError, match=r"policy lacks weights .*score\.weight") as caught:
        check_head(str(policy))
    assert caught.value.hint and "published.reward_model=FOLDER" in caught.value.hint


def test_a_shard_that_is_not_there(tmp_path: Path):
    folder = publish(made("llama"), tmp_path / "rm", shard="10KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(DenserlError, match="cannot load the reward model"):
        loaded(folder)


def test_an_architecture_of_remote_code_alone_is_refused(tmp_path: Path):
    folder = publish(made("llama"), tmp_path / "rm")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "absent"}))
    with pytest.raises(DenserlError, match="cannot load the reward model"):
        loaded(folder)


def test_the_recorded_reward_model_loads(shared: Path):
    folder = shared / "parity" / "rm_forward" / "reward_model"
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(loaded(folder).score.weight, weights["score.weight"])


# the hub's refusals


def http(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = SimpleNamespace(url="https://huggingface.co/some/model", method="GET")
    response: Any = SimpleNamespace(status_code=status, headers={}, request=request)
    return kind("refused", response=response)


REFUSALS = [
    (http(GatedRepoError, 401), "licence is not accepted", "accept it at https://huggingface.co/"),
    (http(GatedRepoError, 403), "licence is not accepted", "hf auth login"),
    (http(RepositoryNotFoundError, 401), "no such model on the hub", "correct the name"),
    (http(RepositoryNotFoundError, 404), "no such model on the hub", "if it is private"),
    (http(RevisionNotFoundError, 404), "no such revision", "tree/main"),
    (http(HfHubHTTPError, 403), "the hub refuses it (403)", "ask for access"),
    (http(HfHubHTTPError, 503), "the hub answers 503", "try again later"),
    (OfflineModeIsEnabled("offline"), "out of reach", "hf download some/model"),
    (OfflineModeIsEnabled("offline"), "out of reach", "accept its licence"),
    (LocalEntryNotFoundError("no entry"), "out of reach", "hf download some/model"),
]


@pytest.mark.parametrize(("refusal", "reason", "advice"), REFUSALS)
def test_what_the_hub_refuses_says_what_to_do(
    refusal: Exception, reason: str, advice: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise refusal

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", refuse)
    model = ModelConfig("some/model")
    published = {"path": "some/model", "option": "published.reward_model"}
    for option, load in (
        ("model.path", lambda: load_causal_lm(model, trained=False)),
        ("model.path", lambda: load_tokenizer(model)),
        ("model.tokenizer", lambda: load_tokenizer(ModelConfig("here", tokenizer="some/model"))),
        (
            "published.reward_model",
            lambda: load_scalar_model(model, **published, fresh_head=False, trained=False),
        ),
    ):
        with pytest.raises(DenserlError) as caught:
            load()
        assert reason in caught.value.message and "some/model" in caught.value.message
        assert "\n" not in caught.value.message
        assert caught.value.hint and advice in caught.value.hint
        assert f"--set {option}=FOLDER" in caught.value.hint
