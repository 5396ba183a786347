"""The model card: its code gives the scores of denserl, and it names no place of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.evaluation import score_responses
from denserl_cli.core.exports.model_card import is_hub_id, model_card, public_name
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.runs.folder import RunFolder
from tests import tiny

GRANULARITIES = [
    ("segmentation.granularity=segment", "segmentation.cutoff=1.0"),
    ("segmentation.cutoff=0.7", "reward_model.aggregate=sum"),
    ("segmentation.cutoff=1.0", "reward_model.aggregate=last"),
    ("segmentation.cutoff=null", "segmentation.cut=quantile", "segmentation.quantile=0.8"),
    ("segmentation.cutoff=null", "segmentation.cut=fixed", "segmentation.segment_length=3"),
    ("segmentation.cutoff=null", "segmentation.cut=random", "segmentation.segment_length=3",
     "segmentation.cut_seed=7"),
    ("segmentation.granularity=token", "segmentation.cutoff=null"),
    ("segmentation.granularity=bandit", "segmentation.cutoff=null"),
]  # fmt: skip


def code_of(card: str) -> str:
    """The card's Python."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def record_as(folder: Path, recipe: Recipe) -> RewardRecord:
    """Let the reward model of a run be one for the recipe's segments."""
    record = replace(
        RewardRecord.load(folder / "reward_model"),
        **recipe.segmentation.deciding(),
        aggregate=recipe.reward_model.aggregate,
    )
    record.save(folder / "reward_model")
    (folder / "reward_model" / "normalizer.json").unlink(missing_ok=True)
    return record


def conversations(file: Path, count: int) -> list[list[dict[str, str]]]:
    """Both sides of the first preference pairs in a file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()[:count]]
    return [row[side] for row in rows for side in ("chosen", "rejected")]


def run_card(card: str, model: Path, reference: Path, talks: Sequence[Any]) -> list[float]:
    """The scores that the code of a card gives."""
    code = code_of(card).replace("PATH", str(model)).replace("REFERENCE", str(reference))
    names: dict[str, Any] = {}
    exec(code, names)
    return [names["score"](messages) for messages in talks]


@pytest.mark.parametrize("settings", GRANULARITIES)
def test_the_code_of_the_card_gives_the_score(settings: tuple[str, ...], scored: Path):
    recipe = tiny.recipe(*settings)
    record = record_as(scored, recipe)
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(scored / "reward_model"))
    talks = conversations(scored / "sandbox" / "preferences.jsonl", 4)
    expected = [one.score for one in score_responses(recipe, scored, talks)]
    card = model_card("reward-model", recipe, {}, chat, record)
    found = run_card(card, scored / "reward_model", scored / "sandbox" / "model", talks)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) > 3


@pytest.mark.parametrize("name", ["phi3-mini", "llama3", "llama3.1"])
def test_real_text_gives_the_score_too(name: str, tmp_path: Path, shared: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    base, run = tmp_path / "base", tmp_path / "run"
    config = tiny.config(vocabulary=len(tokenizer))
    config.max_position_embeddings = 4096
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = ["sandbox=null", f"model.path={base}", "data.max_length=4096"]
    RunFolder(run, load_recipe("sandbox-segment", settings)).claim()
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(run / "reward_model")
    tokenizer.save_pretrained(run / "reward_model")
    chat = ChatFormat.of(tokenizer)
    talks = conversations(shared / "data" / "preferences" / "eval.jsonl", 2)
    for cut, cutoff in (("entropy", "8.5"), ("sentence", "null"), ("newline", "null")):
        cuts = [f"segmentation.cut={cut}", f"segmentation.cutoff={cutoff}"]
        recipe = load_recipe("sandbox-segment", [*settings, *cuts])
        record = RewardRecord.of(recipe, chat)
        record.save(run / "reward_model")
        scored = score_responses(recipe, run, talks)
        assert sum(len(one.segments) for one in scored) > len(talks)
        card = model_card("reward-model", recipe, {}, chat, record)
        found = run_card(card, run / "reward_model", base, talks)
        assert found == pytest.approx([one.score for one in scored], abs=1e-5)


def test_a_template_that_writes_the_date_is_fixed_to_the_day_of_training(scored: Path):
    chat_template = (
        "{{ strftime_now('%d %b %Y') }} {% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for folder in (scored / "reward_model", scored / "sandbox" / "model"):
        (folder / "chat_template.jinja").write_text(chat_template)
    recipe = tiny.recipe()
    record = RewardRecord.load(scored / "reward_model")
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(scored / "reward_model"))
    talks = conversations(scored / "sandbox" / "preferences.jsonl", 2)
    expected = [one.score for one in score_responses(recipe, scored, talks)]
    card = model_card("reward-model", recipe, {}, chat, record)
    assert "strftime_now" in code_of(card)
    found = run_card(card, scored / "reward_model", scored / "sandbox" / "model", talks)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "name", "on_hub"),
    [
        ("org/base", "org/base", True),
        ("gpt2", "gpt2", True),
        ("/home/me/models/base", "base", False),
        ("~/base", "base", False),
        ("./base/", "base", False),
        ("models/qwen/base", "base", False),
        ("/x/hub/models--org--base-7b/snapshots/0123", "org/base-7b", False),
    ],
)
def test_a_name_for_others(path: str, name: str, on_hub: bool):
    assert public_name(path) == name
    assert is_hub_id(path) is on_hub


def test_a_folder_beside_the_command_is_no_hub_id(tmp_path: Path, monkeypatch):
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("org/base") and public_name("org/base") == "base"


def test_the_card_holds_no_path_of_this_machine(scored: Path, tmp_path: Path):
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(scored / "reward_model"))
    (tmp_path / "base").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    settings = [
        *("sandbox=null", f"model.path={tmp_path / 'base'}"),
        f"data.preferences=[{{path: {tmp_path / 'pairs.jsonl'}}}]",
    ]
    recipe = load_recipe("sandbox-segment", settings)
    record = RewardRecord.of(recipe, chat)
    for part, about in (("policy", None), ("reward-model", record)):
        card = model_card(part, recipe, {}, chat, about)  # type: ignore[arg-type]
        assert str(tmp_path) not in card
        assert yaml.safe_load(card.split("---")[1])["base_model"] == "base"
        assert "pairs.jsonl" in card


def test_the_card_names_a_base_on_the_hub_and_loads_it(scored: Path):
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(scored / "reward_model"))
    recipe = load_recipe(
        "sandbox-segment", ["sandbox=null", "model.path=org/base", "model.revision=v1"]
    )
    card = model_card("reward-model", recipe, {}, chat, RewardRecord.of(recipe, chat))
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/base"
    assert 'from_pretrained("org/base", revision="v1")' in code_of(card)


def test_the_card_says_which_releases_read_it(scored: Path):
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(scored / "reward_model"))
    recipe = tiny.recipe()
    assert "4.57.6 and 5.23.0" in model_card("policy", recipe, {}, chat)
    untried = model_card("policy", recipe, {}, chat, architecture="new")
    assert "was not tried" in untried and "4.57.6" not in untried
    newest = model_card("policy", recipe, {}, chat, architecture="new", for_both_majors=False)
    assert "use transformers 5" in newest


def test_figures_are_shown_short(scored: Path):
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(scored / "reward_model"))
    figures = {"a": 0.123456, "b": 3, "c": {"start": 1.0, "end": None}}
    card = model_card("policy", tiny.recipe(), figures, chat)
    assert "| a | 0.1235 |\n| b | 3 |\n| c | start 1, end null |" in card
