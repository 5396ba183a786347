"""Conversations become token ids: one prompt and response format everywhere (method §3).

The ids of a conversation are those of the tokenizer's own `apply_chat_template`. Where a content
has the text of a control token in it, the template's pieces are tokenised with control tokens and
contents as plain text. A prompt ends where the content of the answer begins; a response is an
answer's content and one terminator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from denserl_cli.core.chat.answers import PROMPTS, AnswerFormat
from denserl_cli.core.chat.control import ControlTokens, special_ids, token_id
from denserl_cli.core.chat.layouts import Encoded, Layout, Part, follow, tokenize
from denserl_cli.core.chat.pairs import (
    EncodedPair,
    check_limits,
    join_pair,
    truncate_pair,
)
from denserl_cli.core.chat.template import (
    Message,
    Skeleton,
    Template,
    Turns,
    marked_ids,
    name_of,
    plain_turns,
    roles_of,
)
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """How one tokenizer writes conversations; made once by `ChatFormat.of`."""

    template: Template
    answer: AnswerFormat
    """What stands around the content of an answer."""
    stop_ids: tuple[int, ...]
    """Tokens that end a sampled response: the terminator, the tokenizer's eos, further ones."""
    pad_id: int
    """Fills batches; may equal a stop id, for masks come from lengths and never from ids."""
    control: ControlTokens
    """Tokens that no content may yield."""
    by_pieces: bool = True
    """Whether pieces that are tokenised alone give the ids of the whole."""
    to_the_end: ClassVar[bool] = False
    """Whether a response has all that the template writes after an answer."""

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        terminator: str | None = None,
        stop_tokens: Sequence[str] = (),
        template_arguments: Mapping[str, Any] | None = None,
        prompt_ending: str | None = None,
    ) -> ChatFormat:
        """Read a tokenizer's chat template and hold it against `apply_chat_template`.

        Args:
            tokenizer: with a chat template.
            terminator: token that ends an assistant turn; None takes the first special token that
                the template writes after an answer.
            stop_tokens: more tokens that end a sampled response.
            template_arguments: variables for the template.
            prompt_ending: text that prompts must end with.

        Raises:
            DenserlError: no usable chat template, no terminator, an unknown token, an argument that
                the template does not read, prompts that end in another way or contradict the whole
                conversation, other ids than the tokenizer's own.
        """
        template = Template(tokenizer, template_arguments or {})
        answer = AnswerFormat.of(template, terminator, to_the_end=cls.to_the_end)
        if prompt_ending is not None:
            answer.check_ending(template, prompt_ending)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        further = [token_id(tokenizer, token, "chat.stop_tokens") for token in stop_tokens]
        stops = dict.fromkeys(i for i in (answer.terminator_id, eos, *further) if i is not None)
        made = cls(
            template=template,
            answer=answer,
            stop_ids=tuple(stops),
            pad_id=next(i for i in (pad, eos, answer.terminator_id) if i is not None),
            control=ControlTokens.of(tokenizer, {*stops, *answer.written_ids(template)}),
        )
        return _checked(made)

    def __str__(self) -> str:
        """How prompts end and answers follow, in a line."""
        ending = self.template.skeleton(self.answer.roles, True).pieces[-1]
        line = f"prompts end with {ending + self.answer.beginning!r}"
        if self.answer.beginning:
            line += f", of which the template writes {self.answer.beginning!r} with answers alone"
        terminator = self.template.tokenizer.convert_ids_to_tokens(self.terminator_id)
        return f"{line}; answers end with {terminator!r}"

    @property
    def terminator_id(self) -> int:
        """The token that ends an assistant turn."""
        return self.answer.terminator_id

    def token_ids(self) -> set[int]:
        """Every id that a prompt, a response or the padding of a batch may hold."""
        tokenizer = self.template.tokenizer
        ordinary = set(tokenizer.get_vocab().values()) - special_ids(tokenizer)
        written = self.answer.written_ids(self.template)
        return {*ordinary, *written, *self.stop_ids, self.pad_id}

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to the content of the next answer.

        A trailing assistant turn is the answer to the prompt and left out. Raises DenserlError when
        the template refuses the conversation or rewrites a content.
        """
        return self.tokenize([self.prompt_layout(messages)])[0].ids

    def encode_response(self, content: str) -> list[int]:
        """Ids of an answer to a short question and the terminator, the only one among them."""
        return self.tokenize([self.response_layout(content)])[0].ids

    def encode_answer(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer that ends a conversation."""
        return follow(*self.tokenize(self.answer_layouts(messages)))

    def prompt_layout(self, messages: Sequence[Message]) -> Layout:
        """What `encode_prompt` tokenises."""
        turns = plain_turns(messages)
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns:
            raise DenserlError("no prompt before the answer")
        skeleton, contents = self._prompt(turns)
        return Layout(self._parts(skeleton, contents))

    def response_layout(self, content: str) -> Layout:
        """What `encode_response` tokenises."""
        turns = [{"role": role, "content": "?"} for role in self.answer.roles]
        return self._response(turns, content, *self._prompt(turns))

    def answer_layouts(self, messages: Sequence[Message]) -> tuple[Layout, Layout]:
        """What `encode_answer` tokenises."""
        *turns, last = plain_turns(messages) or [{"role": "", "content": ""}]
        if last["role"] != "assistant":
            raise DenserlError("the conversation does not end in an assistant turn")
        if not turns:
            raise DenserlError("no prompt before the answer")
        written = self._prompt(turns)
        return Layout(self._parts(*written)), self._response(turns, last["content"], *written)

    def pair_layouts(
        self, chosen: Sequence[Message], rejected: Sequence[Message], *others: Sequence[Message]
    ) -> list[Layout]:
        """What to tokenise for a pair: its prompt, the chosen answer, the rejected one, others.

        Raises DenserlError when a side does not end in an assistant turn, or when the prompts of
        the sides differ.
        """
        sides = [plain_turns(side) for side in (chosen, rejected, *others)]
        if any(not side or side[-1]["role"] != "assistant" for side in sides):
            raise DenserlError("a side of the pair does not end in an assistant turn")
        turns = sides[0][:-1]
        if any(side[:-1] != turns for side in sides[1:]):
            raise DenserlError("prompts differ within the pair")
        if not turns:
            raise DenserlError("no prompt before the answer")
        written = self._prompt(turns)
        answers = [self._response(turns, side[-1]["content"], *written) for side in sides]
        return [Layout(self._parts(*written)), *answers]

    def tokenize(self, layouts: Sequence[Layout]) -> list[Encoded]:
        """Ids of many layouts at once, which uses all cores."""
        return tokenize(self.template.tokenizer, layouts)

    def _prompt(self, turns: Turns) -> tuple[Skeleton, list[str]]:
        """A prompt's pieces and contents; the last piece ends where the answer begins."""
        skeleton, contents = self.template.fill(turns, generation_prompt=True)
        answer, last = self.answer, skeleton.pieces[-1]
        before = self.template.beginning(roles_of(turns))
        if before != answer.beginning + answer.lead or not (last + answer.beginning).endswith(
            answer.anchor
        ):
            raise DenserlError(
                "the chat template begins the answer to such a conversation in another way",
                hint=f"with {last + before!r} and not with {answer.beginning + answer.lead!r}",
            )
        return skeleton._replace(pieces=(*skeleton.pieces[:-1], last + answer.beginning)), contents

    def _response(
        self, turns: Turns, content: str, skeleton: Skeleton, contents: Sequence[str]
    ) -> Layout:
        """The answer to a prompt."""
        turns = [*turns, {"role": "assistant", "content": content}]
        _, written = self.template.fill(turns, generation_prompt=False)
        if written[:-1] != contents:
            raise DenserlError(
                "the chat template writes the prompt in another way when the answer follows"
            )
        return self._answer(written[-1], skeleton.joined(contents))

    def _answer(self, content: str, prompt: str) -> Layout:
        """An answer's content after the text of a prompt."""
        answer = self.answer
        if self._has_control(content):
            parts = (Part(content, plain=True), Part(answer.closing))
            return Layout(parts, ending=answer.ending)
        context = answer.anchor or prompt
        text = context + answer.lead + content + answer.closing
        return Layout((Part(text),), context, answer.ending)

    def _parts(self, skeleton: Skeleton, contents: Sequence[str]) -> tuple[Part, ...]:
        if not any([self._has_control(content) for content in contents]):
            return (Part(skeleton.joined(contents)),)
        inner = [Part(content, plain=True) for content in contents]
        pieces = [Part(piece) for piece in skeleton.pieces]
        pairs = zip(pieces, inner, strict=False)
        return (*(part for pair in pairs for part in pair), pieces[-1])

    def _has_control(self, content: str) -> bool:
        """Whether a content has the text of a control token in it.

        Raises DenserlError when this tokenizer cannot write it as plain text.
        """
        found = self.control.pattern.search(content)
        if found is None:
            return False
        for token in self.control.unwritable:
            if token in content:
                raise DenserlError(f"this tokenizer cannot write {token} as plain text")
        if not self.by_pieces:
            raise DenserlError(
                f"this tokenizer cannot write {found[0]} as plain text without tokens that the "
                "chat template does not write"
            )
        return True


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to the content of the next assistant turn (method §3).

    messages: mappings with `role` and `content`; a trailing assistant turn is the answer to the
    prompt and left out. Raises DenserlError when the tokenizer has no usable chat template, or when
    the template refuses the conversation.
    """
    return _format_of(tokenizer, _template_of(tokenizer)).encode_prompt(messages)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    *,
    max_length: int,
    max_prompt_length: int,
) -> EncodedPair:
    """Ids of a preference pair, truncated as method §3 has it; responses end with the terminator.

    Args:
        tokenizer: with a chat template.
        chosen: messages that end in an assistant turn.
        rejected: the same prompt with another answer.
        max_length: tokens of prompt and longer response.
        max_prompt_length: tokens that the prompt keeps when they exceed it.

    Raises:
        DenserlError: pairs and limits that make no sense, conversations that the template refuses.
    """
    check_limits(max_length, max_prompt_length)
    chat = _format_of(tokenizer, _template_of(tokenizer))
    pair = join_pair(*chat.tokenize(chat.pair_layouts(chosen, rejected)))
    return truncate_pair(pair, max_length, max_prompt_length, chat.terminator_id)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(getattr(tokenizer, "chat_template", None))


@lru_cache(maxsize=8)
def _format_of(tokenizer: PreTrainedTokenizerBase, template: str) -> ChatFormat:
    """The format of a tokenizer, for as long as its template stays the same."""
    return ChatFormat.of(tokenizer)


_ORDINARY = ("What is 2 + 2", "Four", "Two\n\nparagraphs, naïve 你好 🙂", "Why so")
_EDGES = ("Four.", " led by a blank", "\nby a line break.", "ends so \n", "(one)", "a  b\n\n")
"""Contents without control tokens: ordinary ones, and others that tokenizers may trip on."""


def _checked(chat: ChatFormat) -> ChatFormat:
    """The format, once its ids are those of the tokenizer's own `apply_chat_template`."""
    if not _is_exact(chat, (*_ORDINARY, *_EDGES)):
        chat = replace(chat, answer=chat.answer._replace(anchor=""))
        if not _is_exact(chat, (*_ORDINARY, *_EDGES)):
            raise DenserlError(
                f"{name_of(chat.template.tokenizer)}: apply_chat_template gives other ids than "
                "the tokenizer gives for the text that it writes",
                hint="name another tokenizer in model.tokenizer",
            )
    anything = ControlTokens(re.compile(""), ())
    return replace(chat, by_pieces=_is_exact(replace(chat, control=anything), _ORDINARY))


def _is_exact(chat: ChatFormat, contents: Sequence[str]) -> bool:
    """Whether conversations of these contents have the ids that the tokenizer gives them."""
    conversations: list[Turns] = []
    layouts: list[Layout] = []
    for roles in PROMPTS:
        for shift in range(len(contents)):
            texts = [contents[(shift + n) % len(contents)] for n in range(len(roles) + 1)]
            names = (*roles, "assistant")
            turns = [{"role": r, "content": c} for r, c in zip(names, texts, strict=True)]
            with suppress(DenserlError):  # such a row is refused
                layouts += chat.answer_layouts(turns)
                conversations.append(turns)
    encoded = chat.tokenize(layouts)
    prompts, responses = encoded[::2], encoded[1::2]
    if not chat.answer.beginning:
        asked = chat.template.ids([turns[:-1] for turns in conversations], True)
        if asked != [prompt.ids for prompt in prompts]:
            return False
    wholes = _whole_ids(chat, conversations)
    for prompt, response, whole in zip(prompts, responses, wholes, strict=True):
        found = list(chain(*follow(prompt, response)))
        if found != whole[: len(found)]:
            return False
    return True


def _whole_ids(chat: ChatFormat, conversations: Sequence[Turns]) -> list[list[int]]:
    template, ending = chat.template, chat.answer.ending
    if not ending:
        return template.ids(conversations, False)
    texts = []  # the template ends no answer: what follows the content is left out
    for turns in conversations:
        after = template.skeleton(roles_of(turns), False).pieces[-1]
        texts.append(template.render(turns, False).removesuffix(after))
    return [[*ids, *ending] for ids in marked_ids(template.tokenizer, texts)]
