from __future__ import annotations

from typing import Any

import pytest

from denserl_cli.core.data.row_formats import UnusableRow, has_tools, pair_of, prompt_of
from tests.fakes import bot, user

SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    "fields",
    [
        {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        {"prompt": "q", "chosen": [bot("a")], "rejected": [bot("b")]},
        {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
        # whole conversations beside a prompt column, as UltraFeedback has them
        {"prompt": "q", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"chosen": [{**user("q"), "id": 1}, bot("a")], "rejected": [user("q"), bot("b")]},
    ],
)
def test_every_form_of_a_pair_reads_the_same(fields: dict[str, Any]) -> None:
    pair = pair_of(fields)
    assert pair == ([user("q"), bot("a")], [user("q"), bot("b")], None, False)


def test_a_system_message_and_earlier_turns_belong_to_the_prompt() -> None:
    prompt = [SYSTEM, user("q"), bot("a"), user("r")]
    pair = pair_of({"prompt": prompt, "chosen": [bot("x")], "rejected": [bot("y")]})
    assert pair.chosen == [*prompt, bot("x")] and pair.rejected == [*prompt, bot("y")]


def test_the_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": " b", "image": None}]
    fields = {"prompt": [user("q")], "chosen": [bot(parts)], "rejected": [bot([])]}
    with pytest.raises(UnusableRow, match="empty answer"):
        pair_of(fields)
    found = pair_of({**fields, "rejected": [bot("c")], "tools": [{"name": "f"}]})
    assert found.chosen[-1] == bot("a\n b")


@pytest.mark.parametrize("none", [None, [], "", "[]", {}, "null"])
def test_a_row_without_tools_brings_none(none: object) -> None:
    assert not has_tools({"tools": none}) and not has_tools({})
    assert has_tools({"tools": [{"name": "f"}]}) and has_tools({"tools": '[{"name": "f"}]'})


def test_messages_that_merely_could_call_tools_are_messages() -> None:
    message = {**bot("a"), "tool_calls": [], "function_call": None}
    assert pair_of(pair([user("q"), message], [user("q"), bot("b")])).chosen[-1] == bot("a")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


def test_a_transcript_keeps_its_turns_and_its_contents() -> None:
    before = "\n\nHuman: one\n two \n\nAssistant: \n\nHuman: three\n\nAssistant:"
    pair = pair_of({"chosen": before + "  yes", "rejected": before + " no\n"})
    assert pair.chosen == [user("one\n two "), bot(""), user("three"), bot(" yes")]
    assert pair.rejected[-1] == bot("no\n")


def test_texts_without_a_prompt_share_their_beginning_up_to_a_white_space() -> None:
    pair = pair_of({"chosen": "What is red?\n\na colour ", "rejected": "What is red?\n\na car"})
    assert pair.guessed
    assert pair.chosen == [user("What is red?\n\na"), bot("colour ")]
    assert pair.rejected == [user("What is red?\n\na"), bot("car")]


@pytest.mark.parametrize(("given", "read"), [(2, 2.0), (-0.5, -0.5), (None, None)])
def test_a_margin_is_a_number(given: object, read: float | None) -> None:
    fields = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": given}
    assert pair_of(fields).margin == read


def pair(chosen: Any, rejected: Any, **others: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected, **others}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rejected": "a", "prompt": "q"}, "no chosen"),
        (pair("a", None, prompt="q"), "no rejected"),
        (pair([], [bot("a")]), "no chosen"),
        (pair("a", [user("q"), bot("b")]), "wrong type"),
        (pair(1, 2), "wrong type"),
        (pair({"role": "user"}, {"role": "user"}), "wrong type"),
        (pair(["q", "a"], ["q", "b"]), "wrong type"),
        (pair([user("q"), {"role": "assistant"}], [user("q"), bot("b")]), "wrong type"),
        (pair([user("q"), {"role": "assistant", "content": [1]}], [bot("b")]), "wrong type"),
        (pair([{"from": "human", "value": "q"}], [bot("b")]), "wrong type"),
        (pair([user("q"), bot([{"type": "image"}])], [user("q"), bot("b")]), "wrong type"),
        (pair([user("q"), bot([{"type": "text"}])], [user("q"), bot("b")]), "wrong type"),
        (pair([user("q"), CALL], [user("q"), bot("b")]), "uses tools"),
        (pair([user("q"), {"role": "tool", "content": "1"}, bot("a")], [bot("b")]), "uses tools"),
        (pair([user("q"), {**bot("a"), "function_call": {"name": "f"}}], [bot("b")]), "uses tools"),
        (pair("a", "b", prompt=7), "wrong type"),
        (pair("a\ud800", "b", prompt="q"), "not Unicode text"),
        (pair("a", "b", prompt=""), "no prompt"),
        (pair([bot("a")], [bot("b")], prompt=[]), "no prompt"),
        (pair("yes", "no"), "no prompt"),
        (pair([user("q"), bot(" \n")], [user("q"), bot("b")]), "empty answer"),
        (pair("What? ", "What? Yes"), "empty answer"),
        (pair("a", "a", prompt="q"), "identical answers"),
        (pair([user("q"), bot("a")], [user("r"), bot("b")]), "prompts differ within the pair"),
        (pair([bot("a")], [bot("b")]), "roles in the wrong order"),
        (pair([user("q")], [user("q")]), "roles in the wrong order"),
        (pair([user("q"), user("q"), bot("a")], [user("q"), bot("b")]), "roles in the wrong order"),
        (pair([user("q"), SYSTEM, bot("a")], [user("q"), bot("b")]), "roles in the wrong order"),
        (pair([SYSTEM], [SYSTEM]), "roles in the wrong order"),
        (pair("a", "b", prompt="q", margin="2"), "bad margin"),
        (pair("a", "b", prompt="q", margin=True), "bad margin"),
        (pair("a", "b", prompt="q", margin=float("nan")), "bad margin"),
        (pair("a", "b", prompt="q", margin=10**400), "bad margin"),
    ],
)
def test_a_row_that_is_no_pair_says_why(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRow) as caught:
        pair_of(fields)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"prompt": "q", "id": 1}, [user("q")]),
        ({"prompt": [SYSTEM, user("q")], "id": 1}, [SYSTEM, user("q")]),
        ({"messages": [user("q"), bot("a"), user("r"), bot("b")], "id": 1},
         [user("q"), bot("a"), user("r")]),
        ({"chosen": [user("q"), bot("a")], "id": 1}, [user("q")]),
        ({"prompt": None, "chosen": [user("q"), bot("a")], "id": 1}, [user("q")]),
    ],
)  # fmt: skip
def test_every_form_of_a_prompt(fields: dict[str, Any], turns: list[dict[str, str]]) -> None:
    found, others = prompt_of(fields)
    assert found == turns
    assert others["id"] == 1 and not {"messages", "chosen"} & set(others)


def test_the_prompt_of_a_pair_of_transcripts() -> None:
    before = "\n\nHuman: q\n\nAssistant: "
    assert prompt_of(pair(before + "a", before + "b"))[0] == [user("q")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": "q"}, "no prompt"),
        ({"prompt": " "}, "no prompt"),
        ({"prompt": 3}, "wrong type"),
        ({"messages": "q"}, "wrong type"),
        ({"messages": [bot("a")]}, "roles in the wrong order"),
        ({"messages": [SYSTEM]}, "roles in the wrong order"),
        ({"chosen": [user("q"), user("r"), bot("a")]}, "roles in the wrong order"),
    ],
)
def test_a_row_that_is_no_prompt_says_why(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRow) as caught:
        prompt_of(fields)
    assert caught.value.reason == reason
