"""A chat template, seen as fixed pieces of text around the contents of the messages.

The template is rendered once for each sequence of roles, with placeholders for contents. What lies
between the placeholders are the template's pieces, so it is known where each content of a rendered
conversation stands, and what the template itself has written (method §3).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, TemplateError, meta

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Turns = list[dict[str, str]]

_PADDING = " \t "

# the date that Llama 3.1's own template falls back on
_TODAY = datetime(2024, 7, 26)
_ARGUMENTS = {"date_string": _TODAY.strftime("%d %b %Y")}
_DATE_CODES = ("%a", "%A", "%b", "%B", "%d", "%-d", "%e", "%m", "%-m", "%y", "%Y", "%F", "%D", "%j",
               "%H", "%I", "%M", "%S", "%p")  # fmt: skip
_NOT_ARGUMENTS = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}


class Slot(NamedTuple):
    """The place of a message's content in the rendered text, and what is trimmed off it there."""

    message: int
    trim_left: bool
    trim_right: bool

    def trim(self, content: str) -> str:
        """The content as the template writes it."""
        content = content.lstrip() if self.trim_left else content
        return content.rstrip() if self.trim_right else content


class Contradiction(DenserlError):
    """A template whose prompts go on otherwise than its whole conversations."""


class Skeleton(NamedTuple):
    """A rendered template without its contents: piece 0, slot 0, piece 1, ..., last piece."""

    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]

    def joined(self, contents: Sequence[str]) -> str:
        """The text with these contents in the slots."""
        pairs = zip(self.pieces, [*contents, ""], strict=True)
        return "".join(piece + content for piece, content in pairs)

    def around(self, place: int, contents: Sequence[str]) -> tuple[str, str]:
        """The text before and after one slot with these contents in the others."""
        before = zip(self.pieces[:place], contents[:place], strict=True)
        after = zip(contents[place + 1 :], self.pieces[place + 2 :], strict=True)
        return (
            "".join(piece + content for piece, content in before) + self.pieces[place],
            self.pieces[place + 1] + "".join(content + piece for content, piece in after),
        )


class Template:
    """The chat template of one tokenizer with fixed arguments; keeps its skeletons.

    Raises DenserlError when the tokenizer has no template, or one that cannot be read, and for
    arguments that it does not read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.given = dict(arguments)
        self.arguments = {**_ARGUMENTS, **arguments}
        source = _source(tokenizer)
        self.variables = _variables(tokenizer, source)
        """Names that the template reads and `arguments` may set."""
        self.source = _fixed_day() + source if "strftime_now" in source else source
        _check_arguments(self)
        self._skeletons: dict[tuple[tuple[str, ...], bool], Skeleton] = {}
        self._beginnings: dict[tuple[str, ...], str] = {}

    def fill(self, turns: Turns, *, generation_prompt: bool) -> tuple[Skeleton, list[str]]:
        """The skeleton for these turns, and the contents of its slots as the template trims them.

        Raises DenserlError when the template refuses the conversation, leaves messages out, or
        changes more of a content than the white space at its ends. Earlier answers may lose their
        beginning: templates leave the thoughts of earlier turns out.
        """
        skeleton = self.skeleton(roles_of(turns), generation_prompt)
        contents = [slot.trim(turns[slot.message]["content"]) for slot in skeleton.slots]
        text = self.render(turns, generation_prompt)
        if skeleton.joined(contents) != text:
            places = range(len(contents))
            contents = [self._written(turns, skeleton, p, generation_prompt) for p in places]
            if skeleton.joined(contents) != text:
                raise DenserlError(
                    "the chat template writes messages in another way together than alone"
                )
        return skeleton, contents

    def _written(
        self, turns: Turns, skeleton: Skeleton, place: int, generation_prompt: bool
    ) -> str:
        """What the template makes of one content, seen between placeholders for the others."""
        message = skeleton.slots[place].message
        turn, marks = turns[message], _marks(len(turns))
        others = [{**t, "content": mark} for t, mark in zip(turns, marks, strict=True)]
        others[message] = turn
        text = self.render(others, generation_prompt)
        head, tail = skeleton.around(place, [marks[slot.message] for slot in skeleton.slots])
        if text.startswith(head) and text.endswith(tail) and len(text) >= len(head) + len(tail):
            written = text[len(head) : len(text) - len(tail)]
            if _keeps(turn["content"], written):
                return written
            # an earlier answer may lose its beginning: its thoughts
            earlier = turn["role"] == "assistant" and message < len(turns) - 1
            if earlier and turn["content"].rstrip().endswith(written.rstrip()):
                return written
        raise DenserlError(
            "the chat template rewrites the content",
            hint=f"of a message of the {turn['role']}, and changes more than the white space at "
            "its ends; leave such messages out, or switch that off in chat.template_arguments",
        )

    def skeleton(self, roles: tuple[str, ...], generation_prompt: bool) -> Skeleton:
        """The pieces around the contents of messages with these roles."""
        key = (roles, generation_prompt)
        if key not in self._skeletons:
            self._skeletons[key] = self._cut(*key)
        return self._skeletons[key]

    def beginning(self, roles: tuple[str, ...]) -> str:
        """What the template writes between a prompt with these roles and the answer's content.

        Raises Contradiction when the prompt is not what a whole conversation has before the answer.
        """
        if roles not in self._beginnings:
            prompt, whole = self.skeleton(roles, True), self.skeleton((*roles, "assistant"), False)
            last = prompt.pieces[-1]
            alike = whole.slots[:-1] == prompt.slots and whole.pieces[:-2] == prompt.pieces[:-1]
            if not (alike and whole.pieces[-2].startswith(last)):
                raise _contradiction(prompt, whole, roles)
            self._beginnings[roles] = whole.pieces[-2].removeprefix(last)
        return self._beginnings[roles]

    def render(self, turns: Sequence[Message], generation_prompt: bool, **more: Any) -> str:
        """The text of a conversation. Raises DenserlError with the template's own complaint."""
        text = self._applied(turns, generation_prompt, tokenize=False, **more)
        assert isinstance(text, str)
        return text

    def ids(self, conversations: Sequence[Turns], generation_prompt: bool) -> list[list[int]]:
        """The ids that the tokenizer itself gives conversations. Raises as `render` does."""
        if not conversations:
            return []
        found = self._applied(conversations, generation_prompt, tokenize=True, return_dict=False)
        return [list(ids) for ids in found]

    def _applied(self, turns: Sequence[Any], generation_prompt: bool, **more: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(turns),
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                **self.arguments,
                **more,
            )
        except (TemplateError, TypeError, ValueError) as error:  # the last two: of its arguments
            raise DenserlError(f"the chat template refuses the conversation: {error}") from error

    def _cut(self, roles: tuple[str, ...], generation_prompt: bool) -> Skeleton:
        """Render placeholders and cut the text at them.

        White space around a placeholder that does not come back is what the template trims.
        """
        marks = _marks(len(roles))
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
        return Skeleton(tuple(pieces), tuple(slots))


def _contradiction(prompt: Skeleton, whole: Skeleton, roles: tuple[str, ...]) -> Contradiction:
    """Both texts, from a little before the place where they part."""
    names = [*(f"<content of {role}>" for role in roles), "<answer>"]
    asked, said = (
        skeleton.joined([names[slot.message] for slot in skeleton.slots])
        for skeleton in (prompt, whole)
    )
    start = max(0, common_length(asked, said) - 40)
    return Contradiction(
        f"the chat template contradicts itself: a prompt of {', '.join(roles)} goes on "
        f"{asked[start : start + 160]!r}, the whole conversation {said[start : start + 160]!r}"
    )


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many of their first items two sequences share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _marks(count: int) -> list[str]:
    """Placeholders for contents: words that a template has no reason to change."""
    return [f"denserl{index}content" for index in range(count)]


def _keeps(content: str, written: str) -> bool:
    """Whether nothing but white space at its ends is gone from a content."""
    return written in content and written.strip() == content.strip()


def name_of(tokenizer: Any) -> str:
    """A tokenizer's folder or hub name, or what it is."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's text. Raises DenserlError when there is none to choose."""
    name = name_of(tokenizer)
    if any(kind.__name__ == "MistralCommonBackend" for kind in type(tokenizer).__mro__):
        raise DenserlError(
            f"the tokenizer {name} is a MistralCommonBackend, which writes conversations by code "
            "of its own and has no chat template",
            hint="transformers makes it wherever mistral-common is installed and tekken.json is "
            "found: uninstall mistral-common, or name in model.tokenizer a copy of the folder that "
            "has tokenizer.json and chat_template.jinja, but no tekken.json",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise DenserlError(
            f"the tokenizer {name} has no chat template",
            hint="name the tokenizer of a chat model in model.tokenizer",
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several, none of them the default
        raise DenserlError(
            f"the tokenizer {name} has several chat templates and no default one",
            hint="name a tokenizer with one chat template in model.tokenizer",
        ) from error


def _variables(tokenizer: PreTrainedTokenizerBase, source: str) -> set[str]:
    """Names that a template reads from outside. Raises DenserlError when it cannot be parsed."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    untracked = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # transformers' own tag
    try:
        names = meta.find_undeclared_variables(environment.parse(untracked))
    except TemplateError as error:
        raise DenserlError(
            f"the chat template of {name_of(tokenizer)} is broken: {error}",
            hint="name another tokenizer in model.tokenizer",
        ) from error
    taken = inspect.signature(tokenizer.apply_chat_template).parameters
    return names - set(taken) - _NOT_ARGUMENTS


def _fixed_day() -> str:
    """A macro in place of transformers' `strftime_now`: a prompt reads the same on any day."""
    filters = "".join(f"|replace({code!r},{_TODAY.strftime(code)!r})" for code in _DATE_CODES)
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n"


def roles_of(turns: Turns) -> tuple[str, ...]:
    """Who speaks, in order."""
    return tuple(turn["role"] for turn in turns)


def _check_arguments(template: Template) -> None:
    """Raise DenserlError for arguments that would change nothing: most likely a slip."""
    for name in template.given:
        if name not in template.variables:
            near = get_close_matches(name, template.variables, 1)
            raise DenserlError(
                f"chat.template_arguments: the chat template of {name_of(template.tokenizer)} "
                f"reads no variable {name!r}{f', did you mean {near[0]!r}?' if near else ''}",
                hint="leave it out, or name the tokenizer whose template has it in model.tokenizer",
            )


def plain_turns(messages: Sequence[Message]) -> Turns:
    """Role and content alone: a template must not branch on a data set's other keys.

    An empty system message is none. Raises DenserlError when role or content is missing or no
    Unicode text.
    """
    turns = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not (isinstance(role, str) and isinstance(content, str)):
            raise DenserlError("a message needs a role and a content, both text")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise DenserlError(f"a content is no Unicode text: {error}") from error
        if content or role != "system":
            turns.append({"role": role, "content": content})
    return turns


def marked_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts as `apply_chat_template` does; one call for all cores."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


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
