"""Messages, transcripts and texts to turns with nothing but role and content."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from denserl_cli.core.data.column_paths import transposed
from denserl_cli.core.data.unusable import UnusableRow, shown
from denserl_cli.core.recipe.schema import MessageKeys

Turns = list[dict[str, str]]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
}
"""What roles mean, whatever their case."""
_SPEAKERS = ("Human", "Assistant")
_TOOL_ROLES = ("tool", "function", "ipython", "function_call", "observation")
_KEYS = (("role", "content"), ("from", "value"))
_TEMPLATE_MARKS = re.compile(
    r"\s*(<\|im_start\|>|<\|start_header_id\|>|<\|begin_of_text\|>|<\|start\|>|<start_of_turn>"
    r"|<\|user\|>|<\|system\|>|<\|START_OF_TURN_TOKEN\|>|<｜begin▁of▁sentence｜>|<｜User｜>|<bos>"
    r"|<s>\s*\[INST\]|\[INST\]|<<SYS>>)"
)
_TEMPLATE_ENDS = re.compile(
    r"(<\|im_end\|>|<\|eot_id\|>|<\|end\|>|<\|endoftext\|>|<end_of_turn>|</s>|<eos>"
    r"|<\|eom_id\|>|<\|END_OF_TURN_TOKEN\|>|<｜end▁of▁sentence｜>)\s*\Z"
)
_ANSWER_AWAITED = re.compile(
    r"(?:\A|\n)[#\s]*(assistant|ai|bot|model|gpt|chatgpt|response|answer|output|a):\s*\Z"
    r"|(?-i:\sASSISTANT:\s*\Z)",
    re.I,
)
_SEVERAL_TURNS = re.compile(
    r"\A[#*\s]*(?:user|human)\W{0,2}:.*\n[#*\s]*(?:assistant|ai|bot|chatbot|model|gpt)\W{0,2}:\s*\S",
    re.I | re.S,
)
_NEXT_SPEAKER = re.compile(r"\n(?:Human|Assistant): ")
_OBJECTS = re.compile(r"""\s*\[?\s*\{\s*['"]""")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*['"](role|from|content|value)['"]\s*:""")

MESSAGES_AS_TEXT = "messages as text"
ANSWER_AWAITED = "prompt ends with a speaker"
SEVERAL_TURNS = "text of several turns"
LIST_AS_TEXT = "list as text"
THOUGHTS_LEFT_OUT = "thoughts beside a content"


class MessageReader:
    """Reads messages with a source's names for roles, speakers and keys.

    remarks: what is to be said about the row at hand; whoever reads a row clears it first.
    """

    def __init__(
        self, roles: Mapping[str, str] | None = None, keys: MessageKeys | None = None
    ) -> None:
        self.remarks: set[str] = set()
        self._roles = {**ROLES, **{name.lower(): role for name, role in (roles or {}).items()}}
        self._speakers = {name: name.lower() for name in (*_SPEAKERS, *(roles or ()))}
        self._keys = ((keys.role, keys.content),) if keys else _KEYS
        names = "|".join(map(re.escape, self._speakers))
        self._speaker = re.compile(rf"(?:\A\s*|\n\n)({names}): ?")

    def prompt(self, value: object, column: str) -> Turns:
        """The turns of a question, a transcript or messages, without an empty answer at the end.

        Raises UnusableRow.
        """
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise UnusableRow("no prompt", f"column {column} is empty")
        turns = self.turns(value, column)
        if turns is None:
            text = self._text(value, column)
            if _SEVERAL_TURNS.match(text):
                self.remarks.add(SEVERAL_TURNS)
            elif _ANSWER_AWAITED.search(text):
                self.remarks.add(ANSWER_AWAITED)
            return [{"role": "user", "content": text}]
        unanswered = turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
        return turns[:-1] if unanswered else turns

    def answer(self, value: object, column: str) -> Turns:
        """The turns of an answer: one, or those of its whole conversation. Raises UnusableRow."""
        if value is None or value == []:
            raise UnusableRow(f"no {column}", f"column {column} is empty")
        turns = self.turns(value, column)
        if turns is None:
            return [{"role": "assistant", "content": self._text(value, column)}]
        return turns

    def _text(self, value: object, column: str) -> str:
        """A text that is one content. Raises UnusableRow."""
        text = plain_text(value, column)
        refuse_template(text, column)
        if text.lstrip()[:1] == "[" and text.rstrip()[-1:] == "]":
            items = _parsed(text)
            if isinstance(items, list) and items and all(isinstance(one, str) for one in items):
                self.remarks.add(LIST_AS_TEXT)
        return text

    def turns(self, value: object, column: str) -> Turns | None:
        """The turns of messages or of a transcript, also where they are written as text.

        None for any other text. Raises UnusableRow for what is neither.
        """
        if isinstance(value, str):
            found = self._written_as_text(value, column)
            if found is not None:
                self.remarks.add(MESSAGES_AS_TEXT)
                return self.messages(found, column)
            return self.transcript(value, column)
        return self.messages(value, column)

    def _written_as_text(self, text: str, column: str) -> object:
        """The messages that a text is in JSON or Python; None for another text."""
        if _MESSAGES_AS_TEXT.match(text):
            return _read_text(text, column)
        found = _parsed(text) if _OBJECTS.match(text) else None
        items = found if isinstance(found, list) else [found]
        if all(
            isinstance(item, Mapping)
            and any(role in item and content in item for role, content in self._keys)
            for item in items
        ):
            return found
        return None

    def transcript(self, text: str, column: str) -> Turns | None:
        r"""The turns of `\n\nHuman: ... \n\nAssistant: ...`; None for another text."""
        if not self._speaker.match(text):
            return None
        _, *parts = self._speaker.split(plain_text(text, column))
        turns = [
            {"role": self._roles[speaker.lower()], "content": content}
            for speaker, content in zip(parts[::2], parts[1::2], strict=True)
        ]
        if len(turns) == 1 and not text.startswith("\n\n"):
            return None  # a text that merely begins like one
        if any(_NEXT_SPEAKER.search(turn["content"]) for turn in turns):
            self.remarks.add(SEVERAL_TURNS)
        return turns

    def messages(self, value: object, column: str) -> Turns:
        """The turns of a list of messages, or of one message alone. Raises UnusableRow."""
        value = transposed(value)
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            raise UnusableRow(
                "wrong type",
                f"column {column}: found {_kind(value)} {shown(value)}, wanted text or messages",
            )
        if not value:
            raise UnusableRow("no messages", f"column {column} is an empty list")
        if all(_is_exchange(item) for item in value):
            return [turn for item in value for turn in self._exchange(item, column)]
        return [self._message(message, column) for message in value]

    def _message(self, message: object, column: str) -> dict[str, str]:
        wanted = " or ".join(f"{role} and {content}" for role, content in self._keys)
        if isinstance(message, Mapping):
            for role_key, content_key in self._keys:
                if isinstance(message.get(role_key), str):
                    return self._turn(message, message[role_key], content_key, column)
            found = f"keys {', '.join(map(str, message))}"
        else:
            found = f"{_kind(message)} {shown(message)}"
        raise UnusableRow(
            "wrong type",
            f"column {column}: found a message with {found}, wanted {wanted} (see message_keys)",
        )

    def _turn(
        self, message: Mapping[str, Any], role: str, content_key: str, column: str
    ) -> dict[str, str]:
        calls = message.get("tool_calls") or message.get("function_call")
        if (role.lower() not in self._roles and role in _TOOL_ROLES) or calls:
            raise UnusableRow("uses tools", f"column {column}: found a message of the role {role}")
        meaning = self._roles.get(role.lower())
        if meaning is None:
            raise UnusableRow(
                "unknown role",
                f"column {column}: found {shown(role)}, wanted system, user or assistant; say what "
                "it means in `roles`",
            )
        if any(message.get(key) for key in _THOUGHTS):
            self.remarks.add(THOUGHTS_LEFT_OUT)
        content = plain_text(_joined(message.get(content_key), column), column)
        return {"role": meaning, "content": content}

    def _exchange(self, item: Any, column: str) -> Turns:
        question, answer = (plain_text(text, column) for text in item)
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]


def plain_text(value: object, column: str) -> str:
    """A text that can be written as UTF-8. Raises UnusableRow."""
    if not isinstance(value, str):
        advice = ""
        if hasattr(value, "isoformat"):
            advice = ": the library that read the file took a text for a date; give it as .jsonl"
        raise UnusableRow(
            "wrong type", f"column {column}: found {_kind(value)} {shown(value)}, not text{advice}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("not Unicode text", f"column {column}: {error}") from error
    return value


def refuse_template(text: str, column: str) -> None:
    """Raise UnusableRow for a text that a chat template has written already."""
    for mark, where in ((_TEMPLATE_MARKS.match(text), "begins"), (_end_mark(text), "ends")):
        if mark:
            raise UnusableRow(
                "written by a chat template",
                f"column {column} {where} with {mark[1]}; wanted plain text or messages",
            )


def _end_mark(text: str) -> re.Match[str] | None:
    return _TEMPLATE_ENDS.search(text, max(0, len(text) - 40))


def _is_exchange(item: object) -> bool:
    """Whether an item of a history is a question with its answer."""
    return isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a truth"}
    return kinds.get(type(value), type(value).__name__)


def _read_text(text: str, column: str) -> object:
    """Messages that are written as JSON or as Python text."""
    found = _parsed(text)
    if found is not None:
        return found
    raise UnusableRow(
        "unreadable messages",
        f"column {column} begins like messages, but is neither JSON nor Python: {shown(text)}",
    )


def _parsed(text: str) -> object:
    """What a text is in JSON or Python; None where it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _joined(content: object, column: str) -> object:
    """The text of a content that is a list of parts; anything else as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        if part.get("type") != "text":
            raise UnusableRow(
                "wrong type", f"column {column}: a content has a part of type {part.get('type')}"
            )
    return "".join(plain_text(part.get("text"), column) for part in content)
