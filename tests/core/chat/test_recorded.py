"""Phi-3's ids as the authors' code makes them: 18 of 23 cases are ours, five differ and why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from denserl_cli.core.chat.format import EncodedPair, encode_pair, encode_prompt
from denserl_cli.core.errors import DenserlError
from tests.core.fake_tokenizers import load

Side = list[dict[str, str]]
HEADER = "<|assistant|>\n"


def as_it_is(side: Side) -> Side:
    return side


def without_headers_in_answers(side: Side) -> Side:
    return [*side[:-1], {**side[-1], "content": side[-1]["content"].replace(HEADER, "")}]


# The recorded ids come from the text of the whole template, read with control tokens (`whole_text`)
# after what is named here was done to the conversation. In ours no content has control tokens.
DEFECTS: dict[str, tuple[str, Callable[[Side], Side]]] = {
    "special_text_4": ("<|endoftext|> typed in an answer becomes the control token", as_it_is),
    "special_text_5": (
        "a header typed in an answer is deleted (defect 13)",
        without_headers_in_answers,
    ),
    "special_text_prompt": ("control tokens typed in a prompt become control tokens", as_it_is),
}
LED_BY_BLANKS = "special_text_3"
"""Recorded with an answer that was tokenised alone, and so kept the blanks before its first word
that Phi-3's marker swallows wherever its own template is tokenised."""
EMPTY = "truncate_prompt_equal_budget"
"""Recorded with max_prompt_length = max_length, which leaves no answer (defect 14)."""


@pytest.fixture
def phi3(shared: Path) -> PreTrainedTokenizerBase:
    return load(shared / "tokenizers" / "phi3-mini")


@pytest.fixture
def recorded(shared: Path) -> dict:
    return json.loads((shared / "parity" / "phi3_tokenization.json").read_text(encoding="utf-8"))


@pytest.fixture
def cases(recorded: dict) -> dict[str, dict[str, Any]]:
    """The cases of the real tokenizer and template, with their conversations, by name."""
    conversations = {c["id"]: c for c in recorded["conversations"]}
    return {
        case["tag"]: {**conversations[case["conversation"]], **case}
        for case in recorded["cases"]
        if (case["tokenizer_variant"], case["model_type"]) == ("rstrip_markers", "phi3-instruct")
    }


def ours(tokenizer: PreTrainedTokenizerBase, case: dict[str, Any]) -> EncodedPair:
    limits = {key: case[key] for key in ("max_length", "max_prompt_length")}
    return encode_pair(tokenizer, case["chosen"], case["rejected"], **limits)


def whole_text(tokenizer: PreTrainedTokenizerBase, side: Side) -> list[int]:
    text = tokenizer.apply_chat_template(side, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[: len(ids) - ids[::-1].index(32007)]


def test_pairs_match_the_recorded_ids(phi3: PreTrainedTokenizerBase, cases: dict) -> None:
    alike = set(cases) - set(DEFECTS) - {LED_BY_BLANKS, EMPTY}
    assert len(cases) == 23 and len(alike) == 18
    for tag in alike:
        case, pair = cases[tag], ours(phi3, cases[tag])
        for side, response in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            assert pair.prompt_ids + response == case[f"{side}_input_ids"], tag
            labels = [-100] * len(pair.prompt_ids) + response
            assert labels == case[f"{side}_labels"], tag


@pytest.mark.parametrize("tag", DEFECTS)
def test_what_differs_has_a_known_reason(
    phi3: PreTrainedTokenizerBase, cases: dict, tag: str
) -> None:
    case, pair = cases[tag], ours(phi3, cases[tag])
    reason, defect = DEFECTS[tag]
    for side in ("chosen", "rejected"):
        assert whole_text(phi3, defect(case[side])) == case[f"{side}_input_ids"], reason
    assert pair.prompt_ids + pair.chosen_ids != case["chosen_input_ids"], reason
    # what they lose, ours keep
    for side, response in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        assert phi3.decode(response[:-1]) == case[side][-1]["content"]
    assert case["chosen"][0]["content"].lstrip() in phi3.decode(pair.prompt_ids)


def test_blanks_before_an_answer_are_those_of_the_template(
    phi3: PreTrainedTokenizerBase, cases: dict
) -> None:
    case, pair = cases[LED_BY_BLANKS], ours(phi3, cases[LED_BY_BLANKS])
    assert pair.prompt_ids + pair.chosen_ids == whole_text(phi3, case["chosen"])
    assert pair.prompt_ids + pair.rejected_ids == case["rejected_input_ids"]
    recorded = case["chosen_input_ids"]
    kept = len(pair.prompt_ids)
    assert recorded[:kept] == pair.prompt_ids
    assert phi3.decode(recorded[kept:-1]) == case["chosen"][-1]["content"]
    assert phi3.decode(pair.chosen_ids[:-1]) == case["chosen"][-1]["content"].lstrip()


def test_a_budget_that_leaves_no_answer_is_refused(
    phi3: PreTrainedTokenizerBase, cases: dict
) -> None:
    case = cases[EMPTY]
    assert case["max_prompt_length"] == case["max_length"]
    assert set(case["chosen_labels"]) == {-100}
    with pytest.raises(DenserlError, match="leaves no room for its response"):
        ours(phi3, case)


def test_prompts_match_the_recorded_ids(phi3: PreTrainedTokenizerBase, recorded: dict) -> None:
    conversations = {c["id"]: c for c in recorded["conversations"]}
    asked = [conversations[text["conversation"]] for text in recorded["ppo_prompt_text"]]
    matched = 0
    for batch in recorded["ppo_prompt_batches"]:
        if batch["tokenizer_variant"] != "rstrip_markers":
            continue
        for row, ids, mask in zip(asked, batch["input_ids"], batch["attention_mask"], strict=True):
            theirs = [i for i, kept in zip(ids, mask, strict=True) if kept]
            # an answer's defect is none of its prompt's
            if row["tag"] != "special_text_prompt":
                assert encode_prompt(phi3, row["chosen"])[-batch["prompt_max_len"] :] == theirs
                matched += 1
    assert matched == 44
