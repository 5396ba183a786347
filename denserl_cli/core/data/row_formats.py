"""What a row of data may look like, and what makes it unusable."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

Turns = list[dict[str, str]]

_TOOL_ROLES = ("tool", "function", "ipython")
_NO_TOOLS: tuple[object, ...] = (None, "", "[]", "null", [], {})

_RESPONSES = ("response", "completion", "answer")
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")


class UnusableRow(Exception):
    """Why a row cannot be used: a reason to count by, and what is particular to this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class PairRow(NamedTuple):
    """A preference pair: two conversations that differ in their last, an assistant turn."""

    chosen: Turns
    rejected: Turns
    margin: float | None
    guessed: bool
    """Whether the prompt is merely the text that both sides begin with."""


def pair_of(fields: Mapping[str, Any]) -> PairRow:
    """Read a preference pair.

    Accepted are `chosen` and `rejected` as message lists (whole conversations, or the answer alone
    beside a `prompt`), as texts beside a `prompt`, as Human/Assistant transcripts, and as texts
    with a common beginning. Raises UnusableRow.
    """
    chosen, rejected = (_given(fields, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) is not isinstance(rejected, str):
        raise UnusableRow("wrong type", "one side is text, the other is not")
    prompt = fields.get("prompt")
    guessed = False
    if not isinstance(chosen, str):
        sides = [_conversation(side, prompt) for side in (chosen, rejected)]
    elif prompt is not None:
        sides = [_prompt(prompt) + _answer(_text(side)) for side in (chosen, rejected)]
    elif _SPEAKER.match(chosen) and _SPEAKER.match(rejected):
        sides = [_transcript(_text(side)) for side in (chosen, rejected)]
    else:
        sides, guessed = _common_beginning(_text(chosen), _text(rejected)), True
    _check_pair(*sides)
    # one copy of the prompt for both sides
    return PairRow(sides[0], sides[0][:-1] + sides[1][-1:], _margin(fields), guessed)


def prompt_of(fields: Mapping[str, Any]) -> tuple[Turns, dict[str, Any]]:
    """Read a prompt and the columns that are not part of it.

    Accepted are `prompt` (text or messages), `messages` and `chosen`; an answer at the end is left
    out. Raises UnusableRow.
    """
    name = next((n for n in ("prompt", "messages", "chosen") if fields.get(n) is not None), None)
    if name is None:
        raise UnusableRow("no prompt", "none of prompt, messages, chosen is there")
    if name == "prompt":
        turns = _prompt(fields[name])
    elif name == "chosen" and isinstance(fields[name], str):
        turns = pair_of(fields).chosen
    else:
        turns = _turns(fields[name])
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    _check_roles([*turns, {"role": "assistant"}])
    return turns, {key: value for key, value in fields.items() if key != name}


def conversations_of(fields: Mapping[str, Any]) -> dict[str, Turns]:
    """Read the conversations of a row whose last turns are to be scored, by their side.

    Accepted are preference pairs (sides chosen and rejected, see `pair_of`) and, with the side "",
    `messages` and a `prompt` beside a `response`, `completion` or `answer`. Raises UnusableRow.
    """
    if fields.get("chosen") is not None and fields.get("rejected") is not None:
        pair = pair_of(fields)
        return {"chosen": pair.chosen, "rejected": pair.rejected}
    if fields.get("messages") is not None:
        turns = _turns(fields["messages"])
    else:
        name = next((name for name in _RESPONSES if fields.get(name) is not None), None)
        if name is None:
            known = ", ".join(("messages", *_RESPONSES))
            raise UnusableRow("no response", f"none of {known} is there, nor a pair")
        prompt, answer = _given(fields, "prompt"), fields[name]
        if isinstance(answer, str):
            turns = _prompt(prompt) + _answer(_text(answer))
        else:
            turns = _conversation(answer, prompt)
    _check_roles(turns)
    if not turns[-1]["content"].strip():
        raise UnusableRow("empty answer")
    return {"": turns}


def has_tools(fields: Mapping[str, Any]) -> bool:
    """Whether a row offers the model tools, which prompts leave out."""
    return fields.get("tools") not in _NO_TOOLS


def _given(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    if value is None or value == []:
        raise UnusableRow(f"no {name}")
    return value


def _conversation(side: object, prompt: object) -> Turns:
    """A side's whole conversation; an answer alone continues the prompt beside it."""
    turns = _turns(side)
    alone = len(turns) == 1 and turns[0]["role"] == "assistant"
    return _prompt(prompt) + turns if alone and prompt is not None else turns


def _prompt(value: object) -> Turns:
    if value == [] or (isinstance(value, str) and not value.strip()):
        raise UnusableRow("no prompt", "it is empty")
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value)}]
    return _turns(value)


def _answer(content: str) -> Turns:
    return [{"role": "assistant", "content": content}]


def _turns(value: object) -> Turns:
    """Messages with nothing but role and content, parts of a content joined."""
    if not isinstance(value, list):
        raise UnusableRow("wrong type", f"messages are {type(value).__name__}, not a list")
    turns = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UnusableRow("wrong type", "a message is no object with role and content")
        role, content = message["role"], message.get("content")
        if role in _TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
            raise UnusableRow("uses tools", f"a message of the {role}")
        turns.append({"role": role, "content": _text(_joined(content))})
    return turns


def _joined(content: object) -> object:
    """The text of a content that is a list of parts; anything else as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        if part.get("type") != "text":
            raise UnusableRow("wrong type", f"a content has a part of type {part.get('type')}")
    return "".join(_text(part.get("text")) for part in content)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UnusableRow("wrong type", f"a content is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("not Unicode text", str(error)) from error
    return value


def _transcript(text: str) -> Turns:
    r"""The turns of `\n\nHuman: ... \n\nAssistant: ...`."""
    _, *parts = _SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _common_beginning(chosen: str, rejected: str) -> list[Turns]:
    """Take the text that both sides begin with, up to its last white space, for the prompt."""
    start = 0
    for place, (first, second) in enumerate(zip(chosen, rejected, strict=False), 1):
        if first != second:
            break
        start = place if first.isspace() else start
    prompt = chosen[:start].rstrip()
    if not prompt:
        raise UnusableRow("no prompt", "the two texts do not begin alike")
    return [_prompt(prompt) + _answer(side[start:]) for side in (chosen, rejected)]


def _check_pair(chosen: Turns, rejected: Turns) -> None:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        _check_roles(side)
        if not side[-1]["content"].strip():
            raise UnusableRow("empty answer", name)
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRow("prompts differ within the pair")
    if chosen[-1] == rejected[-1]:
        raise UnusableRow("identical answers")


def _check_roles(turns: Turns) -> None:
    """Perhaps a system message, then user and assistant by turns, assistant last."""
    roles = [turn["role"] for turn in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if talk != ["user", "assistant"] * (len(talk) // 2) or not talk:
        raise UnusableRow("roles in the wrong order", ", ".join(roles))


def _margin(fields: Mapping[str, Any]) -> float | None:
    margin = fields.get("margin")
    if margin is None:
        return None
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not number or not abs(margin) <= sys.float_info.max:
        raise UnusableRow("bad margin", repr(margin))
    return float(margin)
