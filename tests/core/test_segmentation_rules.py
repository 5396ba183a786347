import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from denserl_cli.core.errors import DenserlError, RecipeError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.schema import SegmentationConfig
from denserl_cli.core.sandbox.language_model import build_tokenizer
from denserl_cli.core.sandbox.task import Task
from denserl_cli.core.segmentation import ends_after, segment_ends
from denserl_cli.core.segmentation_rules import (
    NEWLINE,
    SENTENCE,
    Cutter,
    above_quantile,
    after_matches,
    at_random,
    every,
    vocabulary_texts,
)
from denserl_cli.core.stages.run import run_stage
from tests.core.conftest import TASK
from tests.tiny import recipe

MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 2 + [True] * 4])


def pieces(pattern: re.Pattern[str], *tokens: str) -> list[str]:
    """A text given as tokens, cut; the slash shows where tokens end."""
    texts = np.array(tokens, dtype=object)
    cuts = after_matches(pattern, texts, np.array([len(token) for token in tokens]))
    cuts[-1] = True
    ends = np.flatnonzero(cuts) + 1
    return ["/".join(part) for part in np.split(texts, ends)[:-1]]


def words(text: str) -> list[str]:
    return re.findall(r"\s?\S+|\s+", text)


def test_a_sentence_ends_with_its_mark_wherever_the_token_ends():
    assert pieces(SENTENCE, "Go", ".", " He") == ["Go/.", " He"]
    assert pieces(SENTENCE, "Go", ". ", "He") == ["Go/. ", "He"]
    assert pieces(SENTENCE, "Go.", "\n", "\n", "He") == ["Go./\n/\n", "He"]
    assert pieces(SENTENCE, "Go", '."', " He") == ['Go/."', " He"]
    assert pieces(SENTENCE, "Go", ".", '"', " ", "He", "?", " I") == ['Go/./"/ ', "He/?", " I"]
    assert pieces(SENTENCE, "Go", ". He", " went") == ["Go/. He", " went"]  # one token holds both
    assert pieces(SENTENCE, "Safe", "?", " No", ".", " It") == ["Safe/?", " No/.", " It"]
    assert pieces(SENTENCE, "See", " No", ".", " 5") == ["See/ No/./ 5"]
    assert pieces(SENTENCE, "文", "。", "次", "！」", "x") == ["文/。", "次/！」", "x"]


@pytest.mark.parametrize(
    "text",
    ["Ask Dr. Who now", "of J. K. Rowling", "e.g. this", "at 3.14 or v2.0", "well... perhaps",
     "1. An item", "vs. Them", '"Really?" he said'],
)  # fmt: skip
def test_what_is_no_end_of_a_sentence(text: str):
    assert pieces(SENTENCE, *words(text)) == ["/".join(words(text))]


def test_list_items_and_lines_are_sentences():
    text = "Do:\n1. Go far.\n2. Stop"
    assert pieces(SENTENCE, *text) == [
        "/".join(part) for part in ("Do:\n", "1. Go far.\n", "2. Stop")
    ]


def test_lines_keep_their_indent():
    assert pieces(NEWLINE, "if", ":", "\n", "   ", " x", "\n\n", "\n", "y") == [
        "if/:/\n", "   / x/\n\n/\n", "y",
    ]  # fmt: skip
    assert pieces(NEWLINE, "a. B", " c") == ["a. B/ c"]


def test_texts_of_tokens_know_their_spaces(shared):
    for name in ("phi3-mini", "llama3"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
        table, text = vocabulary_texts(tokenizer), 'A dog. "No?" said\n\nthe <b>cat</b>'
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(table[ids]).strip() == text
        assert len(table) == len(tokenizer) + 1 and table[-1] == ""


def test_quantiles_by_hand():
    entropy = torch.tensor([[3.0, 1.0, 5.0, 2.0, 4.0, 9.0]] * 3)
    # of 4 candidates, 5 and the terminator are none: half of 3 1 5 2 is at most 2
    cuts = above_quantile(entropy[:1], MASK[:1], 0.5)
    assert ends_after(cuts, MASK[:1]).tolist() == [[True, False, True, False, True, False]]
    cut_off = torch.tensor([False])
    assert ends_after(
        above_quantile(entropy[:1], MASK[:1], 0.8, cut_off), MASK[:1], cut_off
    ).tolist() == [[False] * 2 + [True] + [False] * 2 + [True]]  # the highest of 5, and the last
    one = ends_after(above_quantile(torch.ones(3, 6), MASK, 0.1), MASK)
    assert torch.equal(
        one, segment_ends(torch.zeros(3, 6), MASK, granularity="segment", cutoff=1.0)
    )


def test_an_entropy_cut_is_the_methods_own():
    entropy = torch.rand(3, 6) * 3
    cut = Cutter(SegmentationConfig("segment", 1.5))(torch.zeros(3, 6).long(), entropy, MASK, None)
    assert torch.equal(cut, segment_ends(entropy, MASK, granularity="segment", cutoff=1.5))
    assert torch.equal(ends_after(entropy > 1.5, MASK), cut)


def test_fixed_lengths_count_from_the_responses_start():
    assert ends_after(every(MASK, 2), MASK).tolist() == [
        [False, True, False, True, True, False],
        [False, True, True, False, False, False],
        [False, False, False, True, True, False],
    ]


def test_random_cuts_follow_the_response_alone():
    ids = torch.randint(1, 50, (8, 400), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    cuts = at_random(ids, mask, 5.0, seed=1)
    assert cuts.float().mean() == pytest.approx(1 / 5, abs=0.02)
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), ids[3:4, :90]), dim=1)
    alone = at_random(padded, padded > 0, 5.0, seed=1)  # another row, padding and length
    assert torch.equal(alone[0, 7:], cuts[3, :90])
    assert not torch.equal(cuts, at_random(ids, mask, 5.0, seed=2))
    assert at_random(ids, mask, 1.0, seed=1).all()


def test_ids_beyond_the_tokenizer_have_no_text():
    tokenizer = build_tokenizer(Task(TASK, 1))
    cut = Cutter(SegmentationConfig("segment", cut="sentence"), tokenizer)
    ids = torch.full((3, 6), len(tokenizer) + 5)
    assert cut(ids, None, MASK, None).sum(1).tolist() == [1, 1, 1]


def test_each_cut_has_its_own_fields():
    with pytest.raises(RecipeError) as refused:
        recipe("segmentation={cut: sentence, quantile: 0.5, cut_seed: 3, segment_length: 4}")
    text = str(refused.value)
    for field in ("cutoff", "quantile", "segment_length", "cut_seed"):
        assert f"segmentation.{field}: belongs to cut" in text
    none = "segmentation.cutoff=null"
    for settings, message in (
        ("{cut: quantile}", "cut quantile needs one"),
        ("{cut: quantile, quantile: 1}", "above 0 and below 1, not 1"),
        ("{cut: fixed, segment_length: 2.5}", "fixed needs whole tokens, not 2.5"),
        ("{cut: random, segment_length: 0.5}", "cannot have 0.5 tokens"),
        ("{granularity: token, cut: fixed}", "token is not cut in another way"),
        ("{cut: sentences}", "did you mean sentence"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(f"segmentation={settings}", none)
    assert recipe("segmentation={cut: random}", none).segmentation.cut_seed == 42


def test_a_cut_goes_with_its_reward_model(tmp_path):
    run, fixed = tmp_path / "run", ("segmentation={cut: fixed, segment_length: 3, cutoff: null}",)
    for stage in ("train-rm", "fit-function"):
        run_stage(stage, recipe(*fixed), run, "start", Observer())
    record = json.loads((run / "reward_model" / "denserl.json").read_text())
    assert (record["cut"], record["segment_length"], record["cutoff"]) == ("fixed", 3.0, None)
    run_stage("train-ppo", recipe(*fixed, "ppo.iterations=1"), run, "start", Observer())
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["segment_length"] == pytest.approx(3, abs=0.5)  # the last segment is a rest
    for other in ("segmentation.segment_length=4", "segmentation={cut: random}"):
        with pytest.raises(DenserlError, match="contradicts the reward model"):
            run_stage("train-ppo", recipe(*fixed, other), run, "fresh", Observer())
