"""Any scalar reward model as the bandit reward: its own tokenizer, template and head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.data.loading import load_prompts
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.inspector import Inspector, answers_of
from denserl_cli.core.models.sequence_classifier import SequenceReader, positions
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.sandbox.files import SandboxFiles
from denserl_cli.core.scoring.loading import load_reward_model, load_scorer
from denserl_cli.core.scoring.resolve import RewardSetup, prepare
from denserl_cli.core.stages.run import run_stage
from tests.core.conftest import MakeRecipe
from tests.core.fake_tokenizers import PLAIN, byte_tokenizer
from tests.core.scoring.test_resolve import PPO
from tests.fakes import RecordingObserver
from tests.tiny import scalar_model

SHAPE = {
    "vocab_size": 270,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,
    "num_labels": 1,
    "pad_token_id": 256,
}
ENCODERS: dict[str, Any] = {
    "bert": (BertForSequenceClassification, BertConfig),
    "roberta": (RobertaForSequenceClassification, RobertaConfig),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config),
    "modernbert": (ModernBertForSequenceClassification, ModernBertConfig),
}
TEXTS = ("words about rivers", "", "  two  spaces ", "<end> café 🤖\n")


def made(name: str, **shape: int) -> Any:
    """A random classifier with one label over bytes."""
    torch.manual_seed(5)
    if name == "llama":
        return scalar_model(5, vocabulary=270)
    if name == "gpt2":
        sizes = {"vocab_size": 270, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 300}
        config = GPT2Config(**sizes, num_labels=1, initializer_range=0.5, pad_token_id=256)
        return GPT2ForSequenceClassification(config).eval()
    kind, config = ENCODERS[name]
    return kind(config(**{**SHAPE, **shape})).eval()


def publish(model: Any, folder: Path, template: str | None = PLAIN) -> Path:
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer(template, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return folder


def bandit(folder: Path, *more: str) -> tuple[str, ...]:
    return (
        "segmentation.granularity=bandit",
        "segmentation.cutoff=null",
        "ppo.interpolation=null",
        "ppo.missing_eos_penalty=null",
        "normalizer.kind=global",
        f"published={{reward_model: {folder}, granularity: bandit}}",
        *PPO,
        *more,
    )


def direct(folder: Path, conversations: list[list[dict[str, str]]]) -> np.ndarray:
    """What transformers alone makes of whole conversations, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    values = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            values.append(model(torch.tensor([ids])).logits.item())
    return np.array(values)


def begin(
    recipe: Recipe, path: Path, observer: Observer | None = None
) -> tuple[RewardSetup, RunFolder]:
    run = RunFolder(path, recipe)
    return prepare(recipe, run, observer or Observer(), reward_model=True), run


NAMES = ["llama", "gpt2", *ENCODERS]


@pytest.mark.parametrize("name", NAMES)
def test_responses_of_the_policy_are_read_as_the_model_itself_would(
    recipe: MakeRecipe, name: str, tmp_path: Path
):
    """Policy ids in, one value at each response's last token out, whatever the batch."""
    folder = publish(made(name), tmp_path / "rm")
    opened, run = begin(recipe(*bandit(folder)), tmp_path / "run")
    assert opened.reward_chat_format is not opened.chat
    prompts = load_prompts(opened.recipe, opened.chat, Observer()).train[:4]
    loaded = load_reward_model(opened.record, opened.recipe, run)
    assert isinstance(loaded.read, SequenceReader) == (name in ENCODERS)
    scorer = load_scorer(opened, run, Observer(), prompts=prompts)
    texts = ["words about rivers", "words", "rivers calm", "write calm words"]
    responses = [opened.chat.encode_response(text) for text in texts]
    responses[1] = responses[1][:-1]  # cut at the length limit
    batch = collate_sequences([p.ids for p in prompts], responses, opened.chat.pad_id)
    found = scorer(batch)
    assert found.token_values is not None
    conversations = [
        [*p.messages, {"role": "assistant", "content": text}]
        for p, text in zip(prompts, texts, strict=True)
    ]
    values = found.token_values[found.ends].numpy()
    np.testing.assert_allclose(values, direct(folder, conversations), atol=1e-4, rtol=1e-4)
    assert values.std() > 1e-4
    assert ((found.token_values != 0) <= found.ends).all()


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_fit_and_ppo_with_a_model_of_another_make(
    recipe: MakeRecipe, slots: SandboxFiles, name: str, tmp_path: Path
):
    folder, path = publish(made(name), tmp_path / "rm"), tmp_path / "run"
    pairs = f"data.preferences=[{{path: {slots.preferences}, max_samples: 12}}]"
    asked = recipe(*bandit(folder, pairs))
    for stage in ("fit-function", "train-ppo"):
        run_stage(stage, asked, path, "start", Observer())
    answers = answers_of(asked, 12, Observer())
    assert len(answers) == 24
    values = direct(folder, [answer.messages for answer in answers])
    fitted = LocationNormalizer.load(path / "reward_model" / "normalizer.json")
    assert (fitted.b_mean, fitted.b_std) == pytest.approx((values.mean(), values.std()), rel=1e-3)
    shown = Inspector(asked, RunFolder(path, asked), Observer()).segment(answers[:3])
    assert [response.score for response in shown] == pytest.approx(values[:3], rel=1e-3)
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([m["rm_score"] for m in metrics if "rm_score" in m]).all()


def test_what_a_policy_writes_never_stops_the_run(recipe: MakeRecipe, tmp_path: Path):
    """Contents with control words, blanks and nothing at all are conversations like any other."""
    folder = publish(made("bert"), tmp_path / "rm")
    opened, _ = begin(recipe(*bandit(folder)), tmp_path / "run")
    reading = opened.reward_chat_format
    for text in TEXTS:
        ids = reading.encode_response(text)
        assert ids[-2:] == reading.encode_response("")[-2:]  # <end> and a line break
        assert ids.count(260) == 1 and bytes(ids[:-2]).decode() == text


def test_more_tokens_than_the_model_can_read_are_cut_and_counted(
    recipe: MakeRecipe, tmp_path: Path
):
    model = made("roberta", max_position_embeddings=300)
    assert positions(model) == 300 - 257  # positions count from the padding's id on
    folder, recorder = publish(model, tmp_path / "rm"), RecordingObserver()
    asked = recipe(*bandit(folder, "data.max_length=400"))
    opened, run = begin(asked, tmp_path / "run")
    model, read = load_reward_model(opened.record, opened.recipe, run, observer=recorder)
    assert isinstance(read, SequenceReader)
    long = np.arange(100) % 200
    value = read(model, collate_sequences([long[:60]], [long[60:]], 0))[0, -1]
    with torch.no_grad():
        expected = model(torch.from_numpy(long[None, -43:])).logits[0, 0]
    torch.testing.assert_close(value, expected)
    assert len(recorder.notices) == 1 and "1 conversations so far were cut" in recorder.notices[0]
    for _ in range(12):
        read(model, collate_sequences([long[:60]], [long[60:]], 0))
    assert [notice.split()[0] for notice in recorder.notices] == ["1", "10"]


def test_the_policys_own_format_needs_no_translation(
    recipe: MakeRecipe, trained: Path, tmp_path: Path
):
    source = trained / "reward_model"
    folder = tmp_path / "rm"
    AutoModelForSequenceClassification.from_pretrained(source).save_pretrained(folder)
    opened, run = begin(recipe(*bandit(folder)), tmp_path / "none")  # no tokenizer: the recipe's
    assert opened.reward_chat_format is opened.chat
    assert not isinstance(load_reward_model(opened.record, opened.recipe, run).read, SequenceReader)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    opened, _ = begin(recipe(*bandit(folder)), tmp_path / "same")
    assert opened.reward_chat_format is opened.chat


def test_a_tokenizer_without_template_is_refused(recipe: MakeRecipe, tmp_path: Path):
    folder = publish(made("bert"), tmp_path / "rm", template=None)
    with pytest.raises(DenserlError, match="has no chat template") as caught:
        begin(recipe(*bandit(folder)), tmp_path / "run")
    assert str(folder) in caught.value.message
    assert caught.value.hint and "save_pretrained" in caught.value.hint


def test_a_prompt_that_the_models_template_refuses(recipe: MakeRecipe, tmp_path: Path):
    refusing = "{{ raise_exception('no users') if messages|length == 1 }}" + PLAIN
    folder = publish(made("bert"), tmp_path / "rm", template=refusing)
    with pytest.raises(DenserlError, match="no users"):
        run_stage(
            "train-ppo",
            recipe(*bandit(folder, "normalizer.kind=none")),
            tmp_path / "run",
            "start",
            Observer(),
        )


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_that_is_missing_or_has_other_labels(recipe: MakeRecipe, name: str, tmp_path: Path):
    kind, config = ENCODERS[name]
    folder = publish(kind(config(**{**SHAPE, "num_labels": 2})), tmp_path / "rm")
    opened, run = begin(recipe(*bandit(folder)), tmp_path / "run")
    with pytest.raises(DenserlError, match=r"lacks weights of the reward model.*classifier"):
        load_reward_model(opened.record, opened.recipe, run)


def test_such_a_model_starts_no_critic_and_rewards_no_tokens(recipe: MakeRecipe, tmp_path: Path):
    folder = publish(made("bert"), tmp_path / "rm")
    opened, run = begin(recipe(*bandit(folder)), tmp_path / "run")
    with pytest.raises(DenserlError, match="not a plain matrix product") as caught:
        load_reward_model(opened.record, opened.recipe, run, trained=True)
    assert caught.value.hint and "critic_init=policy" in caught.value.hint
    token = (
        "segmentation={granularity: token, cutoff: null}",
        f"published={{reward_model: {folder}, granularity: token}}",
    )
    with pytest.raises(DenserlError, match="has another tokenizer"):
        begin(recipe(*token), tmp_path / "token")


def test_a_model_with_fewer_embeddings_than_tokens(recipe: MakeRecipe, tmp_path: Path):
    folder = publish(made("bert", vocab_size=257), tmp_path / "rm")
    with pytest.raises(DenserlError, match=r"does not fit the reward model .* 257 embeddings"):
        begin(recipe(*bandit(folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
