"""Each known format: rows typed after its public description, read as pairs."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from denserl_cli.core.data.conversations import read_pairs, read_prompts
from denserl_cli.core.data.row_readers import fitting_mapping
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.data_formats import DATA_FORMATS, mapping_settings, row_mappings
from denserl_cli.core.recipe.schema import Columns, Source

Side = list[tuple[str, str]]


class Expected(NamedTuple):
    """What a format's rows give: (prompt, chosen, rejected) each, and the reasons of the others."""

    pairs: list[tuple[Any, str, str]]
    skipped: list[str]


def talk(*contents: str, system: str | None = None) -> Side:
    turns = [
        ("assistant" if place % 2 else "user", content) for place, content in enumerate(contents)
    ]
    return [("system", system), *turns] if system else turns


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image": None, "mimeType": None}]


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [
        message("assistant" if place % 2 else "user", content)
        for place, content in enumerate(contents)
    ]


def hh(*turns: str) -> str:
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[place % 2]}: {turn}" for place, turn in enumerate(turns))


def helpsteer(prompt: str, first: str, second: str, strength: int) -> dict[str, Any]:
    return {
        "split": "train",
        "prompt": prompt,
        "response_1": first,
        "response_2": second,
        "preference_strength": strength,
        "preference_statement": "one is clearer",
        "preference_elaboration": "it says more about what was asked",
    }


def rated(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
    others = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **others}


def nectar(prompt: str, *answers: str) -> dict[str, Any]:
    ranked = [
        {"answer": answer, "model": "m", "rank": float(place)}
        for place, answer in enumerate(answers, 1)
    ]
    return {
        "prompt": prompt,
        "answers": ranked[::-1],
        "turns": 1,
        "num_responses": len(answers),
        "source": ["a source"],
        "good_natured": True,
    }


def shp(history: str, a: str, b: str, label: Any) -> dict[str, Any]:
    return {
        "post_id": "x1",
        "domain": "askbakers_train",
        "history": history,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": label,
        "score_A": 12,
        "score_B": 3,
        "seconds_difference": 60.0,
    }


def webgpt(question: str, first: str, second: str, score: float) -> dict[str, Any]:
    return {
        "question": {"dataset": "eli5", "id": "a1", "full_text": question},
        "quotes_0": {"title": ["a page"], "extract": ["some words of a page"]},
        "answer_0": first,
        "score_0": score,
        "answer_1": second,
        "score_1": -score,
    }


def arena(winner: str, a: Any, b: Any) -> dict[str, Any]:
    return {
        "question_id": "7",
        "model_a": "tulip-7b",
        "model_b": "rose-9b",
        "winner": winner,
        "conversation_a": a,
        "conversation_b": b,
        "turn": 1,
        "language": "English",
        "tstamp": 1.5,
    }


def kaggle(prompts: list[str], a: list[str], b: list[str], wins: str) -> dict[str, Any]:
    return {
        "id": 3,
        "model_a": "tulip-7b",
        "model_b": "rose-9b",
        "prompt": json.dumps(prompts),
        "response_a": json.dumps(a),
        "response_b": json.dumps(b),
        "winner_model_a": int(wins == "a"),
        "winner_model_b": int(wins == "b"),
        "winner_tie": int(wins == "tie"),
    }


def judged(question: str, a: str, b: str, label: str) -> dict[str, Any]:
    return {
        "pair_id": "p",
        "original_id": "o",
        "source": "mmlu-pro-law",
        "question": question,
        "response_model": "m",
        "response_A": a,
        "response_B": b,
        "label": label,
    }


def farm(instruction: str, given: str, first: str, second: str, better: Any) -> dict[str, Any]:
    return {
        "instruction": instruction,
        "input": given,
        "output_1": first,
        "output_2": second,
        "preference": better,
        "raw_preference": better,
    }


def safe(prompt: str, first: str, second: str, better: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response_0": first,
        "response_1": second,
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": better,
        "safer_response_id": 0,
    }


def reply(text: str, rank: int | None, *replies: Any, role: str = "assistant") -> dict[str, Any]:
    return {"message_id": text, "text": text, "role": role, "rank": rank, "replies": list(replies)}


def tree(*replies: Any) -> dict[str, Any]:
    prompt = reply("Name a tree", None, *replies, role="prompter")
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": prompt}


def flat(key: str, parent: str | None, role: str, rank: int | None = None) -> dict[str, Any]:
    return {
        "message_id": key,
        "parent_id": parent,
        "message_tree_id": "t",
        "text": f"text {key}",
        "role": role,
        "lang": "en",
        "deleted": False,
        "rank": rank,
    }


def step(*rated: tuple[str, int | None], chosen: int | None = 0) -> dict[str, Any]:
    completions = [{"text": text, "rating": rating, "flagged": False} for text, rating in rated]
    return {
        "completions": completions,
        "human_completion": None,
        "chosen_completion": chosen,
    }


def solution(problem: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {
        "labeler": "l",
        "timestamp": "2022-07-17T16:56:51",
        "question": {"problem": problem, "ground_truth_answer": "4"},
        "label": {"steps": list(steps), "total_time": 9, "finish_reason": "solution"},
    }


def completed(prompt: str, completion: str, label: bool) -> dict[str, Any]:
    return {
        "prompt": [message("user", prompt)],
        "completion": [message("assistant", completion)],
        "label": label,
    }


def completions(*scores: tuple[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "model": "m",
            "response": text,
            "fine-grained_score": score,
            "overall_score": 10.0,
            "custom_system_prompt": "be honest",
            "principle": "honesty",
        }
        for text, score in scores
    ]


CASES: dict[str, tuple[str, list[dict[str, Any]], Expected]] = {
    "hh-rlhf": (
        "hh-rlhf",
        [
            {"chosen": hh("q", " a"), "rejected": hh("q", " b")},
            {"chosen": hh("q", "a", "r", "yes\n"), "rejected": hh("q", "a", "r", "no")},
            {"chosen": hh("q", "a"), "rejected": hh("q", "a")},
            {"chosen": hh("q", ""), "rejected": hh("q", "b")},
            {"chosen": hh("q", "a"), "rejected": hh("s", "b")},
            {"chosen": "Plain words here", "rejected": "Plain words there"},
        ],
        Expected(
            [("q", " a", " b"), (talk("q", "a", "r"), "yes\n", "no")],
            [
                "identical answers",
                "empty answer",
                "prompts differ within the pair",
                "no prompt",
            ],
        ),
    ),
    "ultrafeedback": (
        "ultrafeedback",
        [
            {
                "prompt": "q",
                "prompt_id": "1",
                "chosen": chat("q", answer),
                "rejected": chat("q", "b"),
                "messages": chat("q", answer),
                "score_chosen": 8.5,
                "score_rejected": 4.0,
            }
            for answer in ("a", "c", "d", "b", " ")
        ],
        Expected(
            [("q", "a", "b"), ("q", "c", "b"), ("q", "d", "b")],
            ["identical answers", "empty answer"],
        ),
    ),
    "ultrafeedback original": (
        "ultrafeedback",
        [
            {
                "source": "evol",
                "instruction": f"q{place}",
                "models": ["m"],
                "completions": completions(*scores),
                "correct_answers": [],
            }
            for place, scores in enumerate(
                [
                    (("a", 3.0), ("b", 4.5), ("c", 1.25), ("d", 3.0)),
                    (("a", "2"), ("b", "4")),
                    (("a", 2.0), ("b", 2.0)),
                    (("a", 2.0),),
                    (("a", "N/A"), ("b", 4)),
                ]
            )
        ],
        Expected([("q0", "b", "c"), ("q1", "b", "a")], ["tie", "one answer alone", "bad scores"]),
    ),
    "helpsteer2 preference": (
        "helpsteer2",
        [
            helpsteer("q", "one", "two", -3),
            helpsteer("q", "one", "two", 1),
            helpsteer("q", "one", "two", 0),
            helpsteer("q\n\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr", "one", "two", 2),
            helpsteer(" ", "one", "two", 2),
        ],
        Expected(
            [("q", "one", "two"), ("q", "two", "one"), (talk("q", "a", "r"), "two", "one")],
            ["tie", "no prompt"],
        ),
    ),
    "helpsteer2 ratings": (
        "helpsteer2",
        [
            rated("q", "one", 3),
            rated("q", "two", 4),
            rated("r", "one", 2),
            rated("s", "one", 2),
            rated("s", "two", 2),
        ],
        Expected([("q", "two", "one")], ["one answer alone", "tie"]),
    ),
    "helpsteer3": (
        "helpsteer3",
        [
            {
                "domain": "general",
                "language": "english",
                "context": context,
                "response1": "one",
                "response2": "two",
                "overall_preference": strength,
                "individual_preference": [{"score": strength, "reasoning": "it says more"}],
            }
            for context, strength in [
                (chat("q"), -2),
                (chat("q"), 3),
                (chat("q", "a", "r"), -1),
                (chat("q"), 0),
                ([], 1),
            ]
        ],
        Expected(
            [("q", "one", "two"), ("q", "two", "one"), (talk("q", "a", "r"), "one", "two")],
            ["tie", "no prompt"],
        ),
    ),
    "nectar": (
        "nectar",
        [
            nectar(hh("q", " "), "best", "good", "bad"),
            nectar(hh("q", "a", "r", ""), "best", "bad"),
            nectar(hh("q", ""), "best"),
            nectar("plain question", "best", "bad"),
            nectar("", "best", "bad"),
        ],
        Expected(
            [
                ("q", "best", "bad"),
                (talk("q", "a", "r"), "best", "bad"),
                ("plain question", "best", "bad"),
            ],
            ["one answer alone", "no prompt"],
        ),
    ),
    "shp": (
        "shp",
        [
            shp("q", "a", "b", 1),
            shp("q", "a", "b", 0),
            shp("q", "a", "b", "1"),
            shp("q", "a", "a", 1),
            shp("q", "a", "b", 2),
        ],
        Expected(
            [("q", "a", "b"), ("q", "b", "a"), ("q", "a", "b")],
            ["identical answers", "bad preference"],
        ),
    ),
    "webgpt": (
        "webgpt",
        [
            webgpt("q", "a", "b", 1.0),
            webgpt("q", "a", "b", -0.5),
            webgpt("q", "a", "b", 0.0),
            webgpt("q", "", "b", 1.0),
            {**webgpt("q", "a", "b", 0.0), "score_0": None},
        ],
        Expected([("q", "a", "b"), ("q", "b", "a")], ["tie", "empty answer", "bad scores"]),
    ),
    "arena-human 100k": (
        "arena-human",
        [
            arena("model_a", chat("q", "a"), chat("q", "b")),
            arena("model_b", chat("q", "a"), chat("q", "b")),
            arena("tie (bothbad)", chat("q", "a"), chat("q", "b")),
            arena("model_a", chat("q", "a", "r", "c"), chat("q", "b", "r", "d")),
            arena("rose-9b", chat("q", "a"), chat("q", "b")),
        ],
        Expected(
            [("q", "a", "b"), ("q", "b", "a")],
            ["tie", "prompts differ within the pair", "bad preference"],
        ),
    ),
    "arena-human 140k": (
        "arena-human",
        [
            arena("model_a", chat(parts("q"), parts("a")), chat(parts("q"), parts("b"))),
            arena("model_b", chat(parts("q"), parts("a")), chat(parts("q"), parts("b"))),
            arena("both_bad", chat(parts("q"), parts("a")), chat(parts("q"), parts("b"))),
            arena("tie", chat(parts("q"), parts("a")), chat(parts("q"), parts("b"))),
            arena("model_a", chat([{"type": "image"}], parts("a")), chat(parts("q"), parts("b"))),
        ],
        Expected([("q", "a", "b"), ("q", "b", "a")], ["tie", "tie", "wrong type"]),
    ),
    "arena-human 55k": (
        "arena-human",
        [
            kaggle(["q"], ["a"], ["b"], "a"),
            kaggle(["q"], ["a"], ["b"], "b"),
            kaggle(["q"], ["a"], ["b"], "tie"),
            kaggle(["q", "r"], ["a", "c"], ["b", "d"], "a"),
            kaggle(["q", "r"], ["a"], ["b"], "a"),
        ],
        Expected(
            [("q", "a", "b"), ("q", "b", "a")],
            ["tie", "prompts differ within the pair", "wrong number of turns"],
        ),
    ),
    "judgebench": (
        "judgebench",
        [
            judged("q", "a", "b", "A>B"),
            judged("q", "a", "b", "B>A"),
            judged("q", "a", "b", "A=B"),
            judged("q", "a", "b", "A>>B"),
            judged("q", "a", "b", "unsure"),
        ],
        Expected([("q", "a", "b"), ("q", "b", "a"), ("q", "a", "b")], ["tie", "bad preference"]),
    ),
    "rm-bench": (
        "rm-bench",
        [
            {
                "id": 1,
                "prompt": "q",
                "chosen": ["a", "b"],
                "rejected": ["c", "d"],
                "domain": "chat",
            },
            {"id": 2, "prompt": "q", "chosen": ["a"], "rejected": ["c"], "domain": "chat"},
            {"id": 3, "prompt": "q", "chosen": ["a"], "rejected": [], "domain": "chat"},
            {"id": 4, "prompt": "q", "chosen": ["a"], "rejected": ["a"], "domain": "math"},
            {"id": 5, "prompt": "", "chosen": ["a"], "rejected": ["c"], "domain": "math"},
        ],
        Expected(
            [("q", one, two) for one in "ab" for two in "cd"] + [("q", "a", "c")],
            ["no rejected[*]", "identical answers", "no prompt"],
        ),
    ),
    "reward-bench-2": (
        "reward-bench-2",
        [
            {
                "id": str(place),
                "prompt": "q",
                "chosen": chosen,
                "rejected": ["c", "d", "e"],
                "num_correct": len(chosen or ()),
                "total_completions": 4,
                "models": ["m"],
                "subset": "Math",
            }
            for place, chosen in enumerate([["a"], ["a", "b"], ["c"], [""], None])
        ],
        Expected(
            [("q", "a", x) for x in "cde"]
            + [("q", one, x) for one in "ab" for x in "cde"]
            + [("q", "c", x) for x in "de"],
            ["empty answer", "no chosen[*]"],
        ),
    ),
    "alpaca-farm": (
        "alpaca-farm",
        [
            farm("do", "this", "one", "two", 1),
            farm("do", "", "one", "two", 2),
            farm("do", "this", "one", "two", "2"),
            farm("do", "this", "one", "two", 1.5),
            farm("do", "this", "one", "two", 3),
        ],
        Expected(
            [("do\n\nthis", "one", "two"), ("do", "two", "one"), ("do\n\nthis", "two", "one")],
            ["tie", "bad preference"],
        ),
    ),
    "sharegpt-dpo": (
        "sharegpt-dpo",
        [
            {
                "conversations": turns,
                "chosen": said("gpt", "a"),
                "rejected": said("gpt", "b"),
                "system": system,
            }
            for turns, system in [
                ([said("human", "q")], ""),
                ([said("human", "q")], "be kind"),
                ([said("system", "be brief"), said("human", "q")], None),
                ([said("human", "q"), said("gpt", "a"), said("human", "r")], None),
                ([said("human", "q"), said("judge", "a")], None),
            ]
        ],
        Expected(
            [
                ("q", "a", "b"),
                (talk("q", system="be kind"), "a", "b"),
                (talk("q", system="be brief"), "a", "b"),
                (talk("q", "a", "r"), "a", "b"),
            ],
            ["unknown role"],
        ),
    ),
    "orca-dpo": (
        "orca-dpo",
        [
            {"system": "be kind", "question": "q", "chosen": "a", "rejected": "b"},
            {"system": "", "question": "q", "chosen": "a", "rejected": "b"},
            {"system": "be kind", "question": "", "chosen": "a", "rejected": "b"},
            {"system": "be kind", "question": "q", "chosen": "a", "rejected": "a"},
            {"system": "be kind", "question": "q", "chosen": None, "rejected": "a"},
        ],
        Expected(
            [(talk("q", system="be kind"), "a", "b"), ("q", "a", "b")],
            ["no prompt", "identical answers", "no chosen"],
        ),
    ),
    "pku-saferlhf": (
        "pku-saferlhf",
        [
            safe("q", "a", "b", 0),
            safe("q", "a", "b", 1),
            safe("q", "", "b", 1),
            safe("", "a", "b", 1),
            safe("q", "a", "b", 4),
        ],
        Expected(
            [("q", "a", "b"), ("q", "b", "a")], ["empty answer", "no prompt", "bad preference"]
        ),
    ),
    "oasst trees": (
        "oasst",
        [
            tree(reply("oak", 1), reply("birch", 0), reply("a stone", 2)),
            tree(
                reply(
                    "oak",
                    0,
                    reply("why?", None, reply("tall", 1), reply("old", 0), role="prompter"),
                )
            ),
            tree(reply("oak", 0), {**reply("birch", 1), "deleted": True}),
            tree(reply("oak", None), reply("birch", None)),
            {"message_tree_id": "t", "prompt": "Name a tree"},
        ],
        Expected(
            [
                ("Name a tree", "birch", "a stone"),
                (talk("Name a tree", "oak", "why?"), "old", "tall"),
            ],
            ["no ranked answers", "no ranked answers", "no tree"],
        ),
    ),
    "oasst messages": (
        "oasst",
        [
            flat("1", None, "prompter"),
            flat("2", "1", "assistant", 1),
            flat("3", "1", "assistant", 0),
            flat("4", "lost", "assistant", 0),
            flat("5", None, "prompter"),
        ],
        Expected([("text 1", "text 3", "text 2")], ["no parent", "no ranked answers"]),
    ),
    "prm800k": (
        "prm800k",
        [
            solution("2+2", step(("add", 1), ("divide", -1)), step(("4", 1), ("5", -1), ("?", 0))),
            solution("2+2", step(("add", 1)), step(("4", 1), ("5", -1), chosen=None)),
            solution("2+2", step(("add", 1)), step(("4", 1))),
            solution("2+2", step(("add", None), ("divide", None))),
            {"question": {"problem": "2+2"}, "label": None},
        ],
        Expected(
            [
                ("2+2", "add", "divide"),
                ("2+2", "add\n4", "add\n5"),
                ("2+2", "add\n4", "add\n5"),
            ],
            ["no step to compare", "no step to compare", "no steps"],
        ),
    ),
    "kto": (
        "kto",
        [
            completed("q", "a", True),
            completed("r", "c", True),
            completed("q", "b", False),
            completed("q", "d", True),
            completed("s", "b", False),
            completed("s", "a", False),
        ],
        Expected([("q", "a", "b"), ("q", "d", "b")], ["one answer alone", "tie"]),
    ),
    "shared-beginning": (
        "shared-beginning",
        [
            {"chosen": "What is red? a colour ", "rejected": "What is red? a car"},
            {"chosen": "yes", "rejected": "no"},
            {"chosen": "The sky is blue", "rejected": "The sky is green"},
            {"chosen": "Same text", "rejected": "Same text"},
            {"chosen": "What? ", "rejected": "What? Yes"},
        ],
        Expected(
            [("What is red? a", "colour ", "car"), ("The sky is", "blue", "green")],
            ["no prompt", "identical answers", "empty answer"],
        ),
    ),
}


def read(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Expected:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_pairs([Source(str(path), **settings)], seed=1)
    pairs = []
    for pair in found.pairs:
        turns = [(turn["role"], turn["content"]) for turn in pair.chosen[:-1]]
        prompt = turns[0][1] if [role for role, _ in turns] == ["user"] else turns
        pairs.append((prompt, pair.chosen[-1]["content"], pair.rejected[-1]["content"]))
        assert pair.chosen[:-1] == pair.rejected[:-1]
    return Expected(pairs, [row.reason for row in found.skipped])


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_known_format_read_as_described(case: str, tmp_path: Path) -> None:
    name, rows, expected = CASES[case]
    found = read(tmp_path / "rows.jsonl", rows, format=name)
    assert found.pairs == expected.pairs
    assert sorted(found.skipped) == sorted(expected.skipped)


def test_every_format_has_a_case() -> None:
    assert {name for name, *_ in CASES.values()} == set(DATA_FORMATS)


@pytest.mark.parametrize("case", CASES)
def test_the_printed_mapping_reads_as_the_format_does(case: str, tmp_path: Path) -> None:
    name, rows, expected = CASES[case]
    source = Source("", format=name)  # type: ignore[arg-type]
    mapping = fitting_mapping(row_mappings(source), rows[0])
    assert mapping is not None
    settings = mapping_settings(mapping)
    columns = Columns(**settings.pop("columns"))
    if mapping.reader is None:
        found = read(tmp_path / "rows.jsonl", rows, columns=columns, **settings)
        assert found.pairs == expected.pairs
    changed = read(tmp_path / "rows.jsonl", rows, format=name, columns=columns, **settings)
    assert changed.pairs == expected.pairs


def test_prompts_of_a_format_are_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(farm("do", "this", "one", "two", 1)) + "\n")
    found = read_prompts([Source(str(path), format="alpaca-farm")], seed=1).prompts
    assert found[0].messages == [{"role": "user", "content": "do\n\nthis"}]
    assert "output_1" in found[0].row and "instruction" not in found[0].row


ODD: list[Any] = [
    *(None, "", " ", "text", 0, -1, 2.5, True, float("nan"), [], {}, [[]], [{}], ["a"], [None]),
    *({"a": []}, {"a": [1]}, [{"role": 1}], "[{'role'", '[{"role": "user"}]', {"text": None}),
    *([{"text": 1, "rating": 1}], "\ud800", [{"from": "human", "value": None}], "\n\nHuman: "),
]


def spoiled(value: Any, rng: random.Random) -> Any:
    """A value of which some part is replaced by something odd."""
    if rng.random() < 0.15:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {key: spoiled(child, rng) for key, child in value.items() if rng.random() > 0.03}
    return [spoiled(child, rng) for child in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", CASES)
def test_odd_values_are_refused_and_never_an_exception(case: str, tmp_path: Path) -> None:
    name, rows, _ = CASES[case]
    rng, path = random.Random(case), tmp_path / "rows.jsonl"
    good = [rows[0], rows[-1]] if name == "oasst" else rows
    many = [spoiled(rng.choice(rows), rng) for _ in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, *many]))
    for settings in ({"format": name}, {"format": name, "pairs": "all", "ties": "keep-as-half"}):
        source = Source(str(path), **settings)  # type: ignore[arg-type]
        with suppress(DenserlError) if DATA_FORMATS[name][-1].group_by else nullcontext():
            found = read_pairs([source], seed=1)
            assert found.pairs and found.skipped
            assert all(row.reason for row in found.skipped)
        read_prompts([source], seed=1)
    with suppress(DenserlError):
        read_pairs([Source(str(path))], seed=1)


DOCS = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_documented_layouts_are_one_and_the_same_pair(tmp_path: Path) -> None:
    block = DOCS.read_text(encoding="utf-8").partition("```json\n")[2].partition("```")[0]
    rows = [json.loads(line) for line in block.splitlines()]
    found = read(tmp_path / "rows.jsonl", rows)
    assert found.pairs == [("Name a tree.", "An oak.", "A stone.")] * 4


def test_the_documented_mappings_load_and_every_format_is_documented(tmp_path: Path) -> None:
    text = DOCS.read_text(encoding="utf-8")
    block = text.partition("```yaml\n")[2].partition("```")[0]
    for name in ("votes.csv", "ranked.parquet"):
        (tmp_path / name).write_bytes(b"")
        block = block.replace(name, str(tmp_path / name))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {{path: owner/name}}\nsegmentation: {{cutoff: 1.0}}\n{block}")
    votes, ranked = load_recipe(str(recipe)).data.preferences
    assert votes.columns == Columns(
        prompt=("instruction", "input"), answers=("output_a", "output_b"), better="vote"
    )
    assert ranked.columns is not None and ranked.pairs == "all"
    assert all(f"`{name}`" in text for name in DATA_FORMATS)
