"""Segments, entropies, values and rewards of texts: against what the models say directly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.inspector import (
    Answer,
    Inspector,
    SegmentedResponse,
    answers_of,
    as_document,
    phrase_agreement,
)
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.segmentation import segment_ends
from tests import tiny


def inspector(folder: Path, *settings: str, rewards: bool = True) -> Inspector:
    recipe = tiny.recipe(*settings)
    return Inspector(recipe, RunFolder(folder, recipe), Observer(), rewards=rewards)


def answers(inspect: Inspector, limit: int) -> list[Answer]:
    return answers_of(inspect.recipe, limit, Observer())


def direct(folder: Path, inspect: Inspector, answer: Answer) -> dict[str, torch.Tensor]:
    """Entropy after, and value at, each response token, one unpadded sequence at a time."""
    chat = ChatFormat.of(inspect.tokenizer)
    prompt = chat.encode_prompt(answer.messages)
    response = chat.encode_response(answer.messages[-1]["content"])
    ids = torch.tensor([[*prompt, *response]])
    reference = AutoModelForCausalLM.from_pretrained(folder / "sandbox" / "model")
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    with torch.no_grad():
        log_p = reference(ids).logits[0, len(prompt) :].log_softmax(-1)
        values = reward_model.score(reward_model.model(ids).last_hidden_state)[0, len(prompt) :, 0]
    return {"entropy": -(log_p.exp() * log_p).sum(-1), "value": values}


def test_entropies_values_and_rewards_are_those_of_the_models(scored: Path):
    inspect = inspector(scored)
    given = answers(inspect, 6)
    normalizer = LocationNormalizer.load(scored / "reward_model" / "normalizer.json")
    for answer, response in zip(given, inspect.segment(given), strict=True):
        expected = direct(scored, inspect, answer)
        entropy = expected["entropy"]
        mask = torch.ones(1, len(entropy), dtype=torch.bool)
        ends = segment_ends(entropy[None], mask, granularity="segment", cutoff=1.0)[0]
        assert [s.end for s in response.segments] == torch.nonzero(ends)[:, 0].tolist()
        assert [s.start for s in response.segments[1:]] == [
            s.end + 1 for s in response.segments[:-1]
        ]
        count = len(response.segments)
        for k, s in enumerate(response.segments, 1):
            assert s.entropy == pytest.approx(entropy[s.end].item(), abs=1e-4)
            assert s.value == pytest.approx(expected["value"][s.end].item(), abs=1e-4)
            z = (s.value - normalizer.mean(k / count)) / normalizer.std(k / count)
            assert s.reward == pytest.approx(z, abs=1e-5)
        assert response.score == pytest.approx(np.mean([s.value for s in response.segments]))
        assert "".join(s.text for s in response.segments) == answer.messages[-1]["content"]
        assert response.prompt == answer.messages[0]["content"]
        assert response.label == answer.label


def test_before_the_reward_model_is_trained_there_are_segments_alone(tmp_path: Path):
    inspect = inspector(tmp_path / "run")
    for response in inspect.segment(answers(inspect, 2)):
        assert response.score is None
        assert all(s.value is None and s.reward is None for s in response.segments)
        assert all(s.entropy is not None for s in response.segments)


def test_without_a_normalizer_there_are_values_and_no_rewards(scored: Path):
    (scored / "reward_model" / "normalizer.json").unlink()
    inspect = inspector(scored)
    (response, _) = inspect.segment(answers(inspect, 1))
    assert all(s.value is not None and s.reward is None for s in response.segments)


def test_bandit_has_one_segment_with_the_terminator_and_no_entropy(tmp_path: Path):
    settings = ("segmentation.granularity=bandit", "segmentation.cutoff=null")
    inspect = inspector(tmp_path / "run", *settings)
    given = answers(inspect, 1)
    (segment,) = inspect.segment(given)[0].segments
    words = len(given[0].messages[-1]["content"].split())
    assert (segment.start, segment.end, segment.entropy) == (0, words, None)


def test_a_reward_model_of_other_segments_is_refused(scored: Path):
    with pytest.raises(DenserlError, match="contradicts the reward model"):
        inspector(scored, "segmentation.cutoff=2.0")
    inspector(scored, "segmentation.cutoff=2.0", rewards=False)


def test_a_long_answer_is_cut_and_ends_its_last_segment_there(scored: Path):
    inspect = inspector(scored, "data.max_length=16", "data.max_prompt_length=8")
    text = " ".join(["bala dare fabo"] * 10)
    messages = [{"role": "user", "content": "write calm words about rivers"}]
    answer = Answer("long", [*messages, {"role": "assistant", "content": text}])
    (response,) = inspect.segment([answer])
    prompt = len(inspect.chat.encode_prompt(messages))
    assert response.segments[-1].end == 16 - min(prompt, 8) - 1
    assert response.segments[-1].entropy is None
    assert text.startswith("".join(s.text for s in response.segments))


def test_batches_do_not_matter(scored: Path, monkeypatch: pytest.MonkeyPatch):
    inspect = inspector(scored)
    given = answers(inspect, 5)
    together = inspect.segment(given)
    monkeypatch.setattr("denserl_cli.core.inspection.inspector.BATCH", 1)
    for left, right in zip(together, inspect.segment(given), strict=True):
        assert [s.text for s in left.segments] == [s.text for s in right.segments]
        assert left.score == pytest.approx(right.score, abs=1e-5)


@pytest.mark.parametrize("length", [1.0, 3.0, 6.0])
def test_a_calibrated_cutoff_gives_about_that_length_on_other_data(length: float, tmp_path: Path):
    inspect = inspector(tmp_path / "run")
    given = answers(inspect, 60)
    cutoff = inspect.calibrate(given[:60], length).cutoff
    other = inspector(tmp_path / "run", f"segmentation.cutoff={cutoff}")
    segments = [s for response in other.segment(given[60:]) for s in response.segments]
    found = np.mean([s.end + 1 - s.start for s in segments])
    assert found == pytest.approx(length, rel=0.2)


@pytest.mark.parametrize("limit", [14, 64])
def test_calibration_knows_which_answers_were_cut(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told: list[torch.Tensor] = []

    def calibrate(entropy, mask, length, terminated) -> float:
        told.extend((mask.sum(1), terminated))
        return 1.0

    monkeypatch.setattr("denserl_cli.core.scoring.calibration.calibrate_cutoff", calibrate)
    inspect = inspector(tmp_path / "run", f"data.max_length={limit}", "data.max_prompt_length=8")
    inspect.calibrate(answers(inspect, 4), 2.0)
    lengths, terminated = told
    assert set(terminated.tolist()) == {limit == 64}
    assert (lengths == 6).all() or limit == 64


def test_the_fitted_sandbox_is_cut_at_its_phrases(scored: Path):
    inspect = inspector(scored)
    agreement = phrase_agreement(tiny.recipe(), inspect.segment(answers(inspect, 20)))
    assert agreement.precision > 0.9 and agreement.recall > 0.9


def test_no_data_is_said_so(tmp_path: Path):
    with pytest.raises(DenserlError, match="no data to segment"):
        answers_of(tiny.recipe(), 1, Observer())


def test_the_document_holds_everything(scored: Path):
    inspect = inspector(scored)
    responses: list[SegmentedResponse] = inspect.segment(answers(inspect, 1))
    document = json.loads(json.dumps(as_document(inspect.cut, responses)))
    assert (document["granularity"], document["cutoff"]) == ("segment", 1.0)
    first = document["responses"][0]
    assert first.keys() == {"label", "side", "prompt", "terminated", "segments", "score"}
    parts = {"text", "start", "end", "entropy", "value", "reward", "per_token"}
    assert first["segments"][0].keys() == parts


@pytest.mark.parametrize("name", ["phi3-mini", "llama3.1"])
def test_real_tokenizers_on_a_small_model(name: str, shared: Path, tmp_path: Path):
    """Text with emoji, leading spaces and markup comes back whole."""
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    tiny.causal_lm(vocabulary=len(tokenizer), hidden=8, layers=1).save_pretrained(folder)
    for file in (shared / "tokenizers" / name).iterdir():
        if file.name != "config.json" and file.is_file():
            shutil.copy(file, folder)
    inspect = inspector(
        tmp_path / "run", "sandbox=null", f"model.path={folder}", "segmentation.cutoff=6.0"
    )
    for text in ("  Two 🤖👩‍🚀 robots\n\n* café <|end|> x", "日本語👍🏽."):
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
        (response,) = inspect.segment([Answer("text", turns)])
        encoded = inspect.chat.encode_response(text)
        joined = "".join(s.text for s in response.segments)
        assert joined == tokenizer.decode(encoded[:-1])
        assert joined.strip() == text.strip()
        assert response.segments[-1].end == len(encoded) - 2
