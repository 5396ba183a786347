"""A chat template, seen as fixed pieces around the contents of the messages.

The template is rendered once for each sequence of roles, with placeholders for contents. What lies
between the placeholders are the template's pieces; their ids are kept. A conversation then costs
the tokenisation of its contents, which are plain text and never control tokens (method §3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

_PADDING = " \t "


class Slot(NamedTuple):
    """The place of a message's content in the rendered text, and what is trimmed off it there."""

    message: int
    trim_left: bool
    trim_right: bool

    def trim(self, content: str) -> str:
        """The content as the template writes it."""
        content = content.lstrip() if self.trim_left else content
        return content.rstrip() if self.trim_right else content


class Skeleton(NamedTuple):
    """A rendered template without its contents: piece 0, slot 0, piece 1, ..., last piece."""

    pieces: tuple[str, ...]
    piece_ids: tuple[list[int], ...]
    slots: tuple[Slot, ...]

    def place(self, message: int) -> int:
        """Which slot holds a message; the piece after it has the next higher number."""
        return [slot.message for slot in self.slots].index(message)


class Template:
    """The chat template of one tokenizer with fixed arguments; keeps its skeletons."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments)
        self._skeletons: dict[tuple[tuple[str, ...], bool], Skeleton] = {}

    def fill(
        self, messages: Sequence[Message], *, generation_prompt: bool
    ) -> tuple[Skeleton, list[str]]:
        """The skeleton for these messages, and the contents of its slots as the template trims.

        Raises DenserlError when the template refuses the conversation, leaves messages out, or
        changes more of a content than the white space at its ends.
        """
        turns = plain_turns(messages)
        skeleton = self.skeleton(tuple(turn["role"] for turn in turns), generation_prompt)
        contents = [slot.trim(turns[slot.message]["content"]) for slot in skeleton.slots]
        pairs = zip(skeleton.pieces, [*contents, ""], strict=True)
        joined = "".join(piece + content for piece, content in pairs)
        if joined != self.render(turns, generation_prompt):
            raise DenserlError(
                "the chat template rewrites the content",
                hint="it changes more of a message than the white space at its ends",
            )
        return skeleton, contents

    def skeleton(self, roles: tuple[str, ...], generation_prompt: bool) -> Skeleton:
        """The pieces around the contents of messages with these roles."""
        key = (roles, generation_prompt)
        if key not in self._skeletons:
            self._skeletons[key] = self._cut(*key)
        return self._skeletons[key]

    def render(self, turns: list[dict[str, str]], generation_prompt: bool) -> str:
        """The text of a conversation. Raises DenserlError with the template's own complaint."""
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt, **self.arguments
            )
        except TemplateError as error:
            raise DenserlError(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def _cut(self, roles: tuple[str, ...], generation_prompt: bool) -> Skeleton:
        """Render placeholders and cut the text at them.

        White space around a placeholder that does not come back is what the template trims.
        """
        marks = [f"denserl{index}content" for index in range(len(roles))]
        padded = [_PADDING + mark + _PADDING for mark in marks]
        turns = [{"role": r, "content": c} for r, c in zip(roles, padded, strict=True)]
        text = self.render(turns, generation_prompt)
        for role, mark in zip(roles, marks, strict=True):
            if text.count(mark) != 1:
                raise DenserlError(f"the chat template does not write {role} messages just once")
        pieces, slots = [], []
        for index in sorted(range(len(roles)), key=lambda index: text.index(marks[index])):
            piece, text = text.split(marks[index])
            trims = not piece.endswith(_PADDING), not text.startswith(_PADDING)
            slots.append(Slot(index, *trims))
            pieces.append(piece.removesuffix(_PADDING))
            text = text.removeprefix(_PADDING)
        pieces.append(text)
        ids = tuple(self.tokenizer.encode(piece, add_special_tokens=False) for piece in pieces)
        return Skeleton(tuple(pieces), ids, tuple(slots))


def plain_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Role and content alone: a template must not branch on a data set's other keys.

    Raises DenserlError when one of the two is missing or no text.
    """
    turns = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not (isinstance(role, str) and isinstance(content, str)):
            raise DenserlError("a message needs a role and a content, both text")
        turns.append({"role": role, "content": content})
    return turns


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts in which a special token is a word like any other; one call for all cores."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"]
