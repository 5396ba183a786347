from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from denserl_cli.core.data.messages import (
    ANSWER_AWAITED,
    LIST_AS_TEXT,
    MESSAGES_AS_TEXT,
    SEVERAL_TURNS,
    THOUGHTS_LEFT_OUT,
)
from denserl_cli.core.data.row_formats import (
    UNREAD,
    RowReader,
    conversations_of,
    has_tools,
    pair_of,
    prompt_of,
)
from denserl_cli.core.data.unusable import UnusableRow
from denserl_cli.core.recipe.data_formats import RowMapping
from denserl_cli.core.recipe.schema import MessageKeys
from tests.fakes import bot, user


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


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
    assert pair == ([user("q"), bot("a")], [user("q"), bot("b")], None, ())


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


@pytest.mark.parametrize(("given", "read"), [(2, 2.0), (-0.5, -0.5), ("5", 5.0), (None, None)])
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
        (
            pair({"role": "user", "content": "q"}, {"role": "user", "content": "q"}),
            "roles in the wrong order",
        ),
        (pair(["q", "a"], ["q", "b"]), "several answers"),
        (pair([user("q"), {"role": "assistant"}], [user("q"), bot("b")]), "wrong type"),
        (pair([user("q"), {"role": "assistant", "content": [1]}], [bot("b")]), "wrong type"),
        (pair([{"speaker": "human", "text": "q"}], [bot("b")]), "wrong type"),
        (pair([{"role": "critic", "content": "q"}], [bot("b")]), "unknown role"),
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
        (pair("What? ", "What? Yes"), "no prompt"),
        (pair("a", "a", prompt="q"), "identical answers"),
        (pair([user("q"), bot("a")], [user("r"), bot("b")]), "prompts differ within the pair"),
        (pair([bot("a")], [bot("b")]), "no prompt"),
        (pair([user("q")], [user("q")]), "roles in the wrong order"),
        (pair([user("q"), user("q"), bot("a")], [user("q"), bot("b")]), "roles in the wrong order"),
        (pair([user("q"), SYSTEM, bot("a")], [user("q"), bot("b")]), "roles in the wrong order"),
        (pair([SYSTEM], [SYSTEM]), "roles in the wrong order"),
        (pair("a", "b", prompt="q", margin="much"), "bad margin"),
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


# layouts that are not quite the plain one

Q, HI = [user("q"), bot("a")], "hello there"
HH = ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b")


@pytest.mark.parametrize(
    ("fields", "remark"),
    [
        (pair(json.dumps(Q), json.dumps([user("q"), bot("b")])), MESSAGES_AS_TEXT),
        (pair(repr(Q), repr([user("q"), bot("b")])), MESSAGES_AS_TEXT),
        (pair(Q, [user("q"), bot("b")], prompt="q", messages=Q), None),
        (pair([said("human", "q"), said("gpt", "a")], [said("Human", "q"), said("AI", "b")]), None),
        (pair(said("gpt", "a"), said("gpt", "b"), prompt=[said("prompter", "q")]), None),
        (pair(bot("a"), bot("b"), prompt=json.dumps([user("q")])), MESSAGES_AS_TEXT),
        (pair("a", "b", prompt=json.dumps([{"id": 1, **user("q")}])), MESSAGES_AS_TEXT),
        (pair([{**bot("a"), "thinking": "hm"}], [bot("b")], prompt="q"), THOUGHTS_LEFT_OUT),
        (pair(*HH, prompt="q"), None),
        # as `datasets` returns sequences of objects
        (pair(*({"role": ["user", "assistant"], "content": ["q", x]} for x in "ab")), None),
        (pair("a", "b", prompt="\n\nHuman: q\n\nAssistant:"), None),
        (pair("a", "b", prompt="q", system="", system_prompt=None, tools=[]), None),
        (pair("a", "b", prompt="q", question="q", source="a book", model_a="m n o"), None),
        (pair("a", "b", prompt="q", input="[]", context="N/A", query="q"), None),
        (pair("a", "b", prompt="q", remark="two words"), f"{UNREAD}remark"),
        (pair("a", "b", prompt="q", task="write all that is asked for here"), f"{UNREAD}task"),
    ],
)
def test_other_ways_to_write_the_same_pair(fields: dict[str, Any], remark: str | None) -> None:
    reader = RowReader()
    found = reader.pairs(fields)
    assert found == [([user("q"), bot("a")], [user("q"), bot("b")], None, ())]
    assert reader.remarks == ({remark} if remark else set())


def test_a_system_column_is_used() -> None:
    for name in ("system", "system_prompt", "system_message"):
        for fields in (
            pair("a", "b", prompt="q"),
            pair(Q, [user("q"), bot("b")]),
            pair(*HH),
            pair([SYSTEM, *Q], [SYSTEM, user("q"), bot("b")]),
        ):
            assert pair_of({**fields, name: "be kind"}).chosen == [SYSTEM, *Q]
        assert prompt_of({"prompt": "q", name: "be kind"})[0] == [SYSTEM, user("q")]
    with pytest.raises(UnusableRow, match="two system messages"):
        pair_of(pair([SYSTEM, *Q], [SYSTEM, user("q"), bot("b")], system="be strict"))


@pytest.mark.parametrize(
    ("fields", "reason", "detail"),
    [
        *(
            (pair("The a is", "The b is", **{name: HI}), "no prompt", f"{{prompt: {name}}}")
            for name in ("question", "instruction", "query", "input", "post", "prompt_text", "zork")
        ),
        (pair("a", "b", instruction=HI, input=HI), "no prompt", "{prompt: [instruction, input]}"),
        (pair("a", "b", trajectory=[user("q")]), "no prompt", "{prompt: trajectory}"),
        (pair("a", "b", system="be kind", question=HI), "no prompt", "format: orca-dpo"),
        *(
            (pair("a", "b", prompt="q", **{name: HI}), "a column is left out", name)
            for name in ("context", "input", "background_story", "userInput", "document")
        ),
        (
            pair("a", "b", prompt="q", history=[["hi you", "yes"]]),
            "a column is left out",
            "history",
        ),
        (pair(Q, [user("q"), bot("b")], context=HI), "a column is left out", "context"),
        (pair("a", "b", prompt="q", images=["x.png"]), "needs more than text", "images"),
        (pair(Q, [user("q"), bot("b")], prompt=HI), "prompts differ within the pair", HI),
        (
            pair("The sky is blue", "The sky is green"),
            "no prompt",
            "found columns chosen, rejected",
        ),
        (pair("User: q\n\nBot: a", "User: q\n\nBot: b"), "no prompt", "wanted prompt"),
        (pair("a", "b", prompt="<|im_start|>user\nq"), "written by a chat template", "im_start"),
        *(
            (pair("a", "b", prompt="q", **{name: text}), "a column is left out", name)
            for name, text in (("input", "dog"), ("context", "法国的首都"), ("my_query", "42"))
        ),
        (
            pair("It says: hi you.", "b", prompt="q", context="hi you"),
            "a column is left out",
            "context",
        ),
        (pair("x", "y", prompt="q", x="a", y="b"), "an answer is the name of a column", "[x, y]"),
        (pair("a<eos>", "b<eos>", prompt="q"), "written by a chat template", "<eos>"),
        (pair("a<|eot_id|>", "b<|eot_id|>", prompt="q"), "written by a chat template", "eot_id"),
        (pair("[{'role': 'user'}\n {'role': 'x'}]", "[{'role': 1} {}]"), "unreadable messages", ""),
        (pair(datetime(2024, 1, 2), "b", prompt="q"), "wrong type", ""),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, "no chosen", "responses"),
        ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}]}, "no chosen", "format: nectar"),
        ({"question": "q", "good": "a", "bad": "b"}, "no chosen", "chosen: BETTER"),
    ],
)
def test_what_may_be_the_question_is_never_dropped(
    fields: dict[str, Any], reason: str, detail: str
) -> None:
    with pytest.raises(UnusableRow) as caught:
        pair_of(fields)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


@pytest.mark.parametrize(
    ("prompt", "answer", "remark"),
    [
        ("User: hi\nAssistant: yes\nUser: bye", "a", SEVERAL_TURNS),
        ("\n\nHuman: hi\nAssistant: yes\nHuman: bye", "a", SEVERAL_TURNS),
        ("### Human: hi\n### Assistant: yes\n### Human: bye", "a", SEVERAL_TURNS),
        ("Be kind. USER: hi ASSISTANT:", "a", ANSWER_AWAITED),
        ("q", '["a"]', LIST_AS_TEXT),
        ("q", "['a', 'c']", LIST_AS_TEXT),
        ("Who is the assistant: you?", "[1, 2]", None),
        ("q", '{"id": 1}', None),
    ],
)
def test_a_text_that_may_be_more_than_one_is_said(
    prompt: str, answer: str, remark: str | None
) -> None:
    reader = RowReader()
    found = reader.pairs(pair(answer, "b", prompt=prompt))
    assert found[0].chosen[-1] == bot(answer)
    assert reader.remarks == ({remark} if remark else set())


def test_a_prompt_tells_what_it_leaves_out_and_keeps_it() -> None:
    reader = RowReader()
    turns, others = reader.prompt({"prompt": "q", "context": "some words", "answer": "4 2"})
    assert turns == [user("q")] and others == {"context": "some words", "answer": "4 2"}
    assert reader.remarks == {f"{UNREAD}context"}


def test_roles_and_keys_of_a_source_name_its_speakers() -> None:
    mapping = RowMapping(roles={"Person": "user", "Robot": "assistant"})
    texts = ("\n\nPerson: q\n\nRobot: a", "\n\nPerson: q\n\nRobot: b")
    assert RowReader(mapping).pairs(pair(*texts))[0].chosen == Q
    keys = RowMapping(roles={"person": "user"}, message_keys=MessageKeys("who", "what"))
    sides = [[{"who": "Person", "what": "q"}, {"who": "bot", "what": x}] for x in "ab"]
    assert RowReader(keys).pairs(pair(*sides))[0].chosen == Q


@pytest.mark.parametrize("name", ["context", "input", "history"])
def test_what_is_scored_has_its_whole_prompt(name: str) -> None:
    for fields in ({"prompt": "q", "response": "a"}, {"messages": Q}):
        assert conversations_of({**fields, "question": "q", "model": "m n"}) == {"": Q}
        with pytest.raises(UnusableRow) as caught:
            conversations_of({**fields, name: HI})
        assert name in caught.value.detail
