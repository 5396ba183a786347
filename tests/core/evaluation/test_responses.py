"""score: rows in, rows out, and the same from Python."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation import score_responses
from denserl_cli.core.evaluation.responses import score_lines
from denserl_cli.core.inspection.inspector import Answer, Inspector
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs.folder import RunFolder
from tests import tiny
from tests.fakes import RecordingObserver

PROMPT = "write calm words about rivers"
TEXT = "bala dare fabo mago nanu pata"
OTHER = "mago nanu pata"


def inspector(folder: Path, *settings: str) -> Inspector:
    recipe = tiny.recipe(*settings)
    return Inspector(recipe, RunFolder(folder, recipe), Observer(), scoring=True)


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": text}]


def scored_rows(inspect: Inspector, rows: list[Any], **options: Any) -> list[dict[str, Any]]:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    out = io.BytesIO()
    score_lines(inspect, "in", [line + b"\n" for line in lines], out, Observer(), **options)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_every_form_of_a_response_scores_the_same(scored: Path):
    inspect = inspector(scored)
    rows = [
        {"messages": turns(TEXT)},
        {"prompt": PROMPT, "response": TEXT},
        {"prompt": PROMPT, "completion": TEXT},
        {"prompt": PROMPT, "answer": TEXT},
        {"prompt": turns(TEXT)[:1], "response": turns(TEXT)[1:]},
        {"prompt": PROMPT, "response": TEXT, "messages": None, "chosen": "alone"},
    ]
    found = scored_rows(inspect, rows)
    (direct,) = inspect.segment([Answer("x", turns(TEXT))])
    for row, one in zip(rows, found, strict=True):
        assert {name: one[name] for name in row} == row
        assert one.keys() - row.keys() == {"score", "segments"}
        assert one["score"] == pytest.approx(direct.score, abs=1e-6)
        assert "".join(part["text"] for part in one["segments"]) == TEXT
        for part, segment in zip(one["segments"], direct.segments, strict=True):
            assert part.keys() == {"text", "start", "end", "value", "reward"}
            assert (part["start"], part["end"]) == (segment.start, segment.end)
            assert part["value"] == pytest.approx(segment.value, abs=1e-6)
            assert part["reward"] == pytest.approx(segment.reward, abs=1e-5)


def test_a_pair_has_two_scores(scored: Path):
    row = {"prompt": PROMPT, "chosen": TEXT, "rejected": OTHER, "messages": turns(TEXT)}
    (found,) = scored_rows(inspector(scored), [row])
    chosen, rejected = score_responses(tiny.recipe(), scored, [turns(TEXT), turns(OTHER)])
    assert found["score_chosen"] == pytest.approx(chosen.score)
    assert found["score_rejected"] == pytest.approx(rejected.score)
    assert len(found["segments_rejected"]) == len(rejected.segments)
    assert "score" not in found


def test_rows_stay_in_order_over_chunks(scored: Path, monkeypatch: pytest.MonkeyPatch):
    inspect = inspector(scored)
    words = TEXT.split()
    rows = [
        {"id": n, "prompt": PROMPT, "response": " ".join(words[: n % 6 + 1])} for n in range(11)
    ]
    rows.insert(4, b"{broken")
    together = scored_rows(inspect, rows)
    monkeypatch.setattr("denserl_cli.core.evaluation.responses.CHUNK", 3)
    monkeypatch.setattr("denserl_cli.core.inspection.inspector.BATCH", 1)
    apart = scored_rows(inspect, rows)
    assert [row.get("id") for row in apart] == [*range(4), None, *range(4, 11)]
    for left, right in zip(together, apart, strict=True):
        assert left.get("score") == pytest.approx(right.get("score"), abs=1e-5)


def test_bad_rows_keep_their_place_and_say_why(scored: Path):
    good = {"prompt": PROMPT, "response": TEXT}
    rows = [
        good,
        b"\xff\xfe",
        b"[1]",
        {"prompt": PROMPT},
        {"response": TEXT},
        {"prompt": PROMPT, "response": " "},
        {"prompt": PROMPT, "response": 7},
        {"messages": turns(TEXT)[:1]},
        {"messages": []},
        {"prompt": PROMPT, "chosen": TEXT, "rejected": TEXT},
        {"prompt": PROMPT, "response": "\ud800"},
    ]
    first, *bad = scored_rows(inspector(scored), rows)
    assert "error" not in first
    reasons = ["not UTF-8", "not an object", "no response", "no prompt", "empty answer",
               "wrong type", "roles in the wrong order", "no messages",
               "identical answers", "not Unicode text"]  # fmt: skip
    for line, (row, reason) in enumerate(zip(bad, reasons, strict=True), 2):
        assert row["score"] is None and row["segments"] is None
        assert row["error"].startswith(f"in:{line}: {reason}")
    assert bad[2]["prompt"] == PROMPT


def test_bad_rows_and_cut_responses_are_counted(scored: Path):
    recorder, inspect = (
        RecordingObserver(),
        inspector(scored, "data.max_length=12", "data.max_prompt_length=8"),
    )
    rows = [{"prompt": PROMPT, "response": TEXT}, {"prompt": PROMPT, "response": OTHER}, {}]
    lines = [json.dumps(row).encode() for row in rows]
    score_lines(inspect, "in", lines, io.BytesIO(), recorder)
    assert recorder.notices == [
        "without a score: 1 x no response: in:3 (none of messages, response, completion, answer "
        "is there, nor a pair)",
        "1 responses were cut to data.max_length 12",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "no rows in in"), ([b" "], "no rows in in"), ([b"x", {}], "no usable row")],
)
def test_a_file_without_a_response_is_an_error(rows: list[Any], message: str, scored: Path):
    with pytest.raises(DenserlError, match=message):
        scored_rows(inspector(scored), rows)


def test_strict_stops(scored: Path):
    rows = [{"prompt": PROMPT, "response": TEXT}, {}]
    with pytest.raises(DenserlError, match="1 rows cannot be used"):
        scored_rows(inspector(scored, "data.strict=true"), rows)


def test_what_the_row_holds_already_is_not_overwritten(scored: Path):
    inspect = inspector(scored)
    once = scored_rows(inspect, [{"prompt": PROMPT, "response": TEXT}, {}])
    with pytest.raises(DenserlError, match="in:1: the row has score, segments already"):
        scored_rows(inspect, once)
    twice = scored_rows(inspect, once, prefix="new_")
    assert twice[0]["new_score"] == twice[0]["score"]
    assert twice[1]["new_error"].startswith("in:2: no response")


def test_any_text_of_a_row_comes_back(scored: Path):
    row = {
        "prompt": PROMPT,
        "response": TEXT,
        "é": "日本 👍🏽\u2028\x00",
        "half": "\ud800",
        "n": 10**30,
    }
    (found,) = scored_rows(inspector(scored), [row])
    assert {name: found[name] for name in row} == row


def test_without_a_normalizer_there_is_no_reward(scored: Path):
    (scored / "reward_model" / "normalizer.json").unlink()
    (found,) = scored_rows(inspector(scored), [{"prompt": PROMPT, "response": TEXT}])
    assert found["score"] is not None
    assert [part["reward"] for part in found["segments"]] == [None] * len(found["segments"])


@pytest.mark.parametrize("granularity", ["token", "bandit"])
def test_only_segments_need_the_reference(granularity: str, scored: Path):
    settings = (f"segmentation.granularity={granularity}", "segmentation.cutoff=null")
    tiny.pretend(scored, tiny.recipe(*settings))
    inspect = inspector(scored, *settings)
    assert inspect.scorer.reference is None
    (found,) = scored_rows(inspect, [{"prompt": PROMPT, "response": TEXT}])
    assert len(found["segments"]) == (6 if granularity == "token" else 1)


def test_python_says_which_conversation_is_wrong(scored: Path):
    with pytest.raises(DenserlError, match="conversation 1: roles in the wrong order"):
        score_responses(tiny.recipe(), scored, [turns(TEXT), turns(TEXT)[:1]])
    assert score_responses(tiny.recipe(), scored, []) == []


def test_without_a_reward_model_nothing_is_made(tmp_path: Path):
    with pytest.raises(DenserlError, match="no reward model"):
        score_responses(tiny.recipe(), tmp_path / "new", [turns(TEXT)])
    assert not (tmp_path / "new").exists()
