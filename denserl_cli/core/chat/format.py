"""Conversations become token ids: one prompt and response format everywhere (method §3).

Template pieces are tokenised with their control tokens, contents as plain text. A prompt ends with
the header of the next assistant turn; a response is an answer's content and one terminator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from denserl_cli.core.chat.template import Message, Skeleton, Template, plain_ids, plain_turns
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Layout = list[list[int] | str]
"""A text on its way to ids: template pieces are ids already, contents are still strings."""

_PROMPTS: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
)
"""Prompts whose ending is looked at when a format is made."""


class EncodedPair(NamedTuple):
    """One prompt and its two responses; each response ends with the terminator."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """How one tokenizer writes conversations; made once by `ChatFormat.of`."""

    template: Template
    terminator_id: int
    """The token that ends an assistant turn."""
    stop_ids: tuple[int, ...]
    """Tokens that end a sampled response: the terminator, the tokenizer's eos, further ones."""
    pad_id: int
    """Fills batches; may equal a stop id, for masks come from lengths and never from ids."""
    unwritable: tuple[str, ...]
    """Control tokens that this tokenizer yields even where they are typed as plain text."""

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        terminator: str | None = None,
        stop_tokens: Sequence[str] = (),
        template_arguments: Mapping[str, Any] | None = None,
        prompt_ending: str | None = None,
    ) -> ChatFormat:
        """Read a tokenizer's chat template.

        terminator: token that ends an assistant turn; None takes the first special token that the
        template writes after an answer. stop_tokens: more tokens that end a sampled response.
        template_arguments: variables for the template. prompt_ending: text that prompts must end
        with.

        Raises DenserlError without a chat template, without a terminator, for an unknown token, for
        an argument that the template does not read, and for prompts that end in another way.
        """
        template = Template(tokenizer, template_arguments or {})
        _check_arguments(template, template_arguments or {})
        if prompt_ending is not None:
            _check_ending(template, prompt_ending)
        special = _special_ids(tokenizer)
        if terminator is None:
            terminator_id = _derive_terminator(template, special)
        else:
            terminator_id = _token_id(tokenizer, terminator, "chat.terminator")
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        further = [_token_id(tokenizer, token, "chat.stop_tokens") for token in stop_tokens]
        stops = dict.fromkeys(i for i in (terminator_id, eos, *further) if i is not None)
        control = special | set(stops) | _markers(template)
        return cls(
            template=template,
            terminator_id=terminator_id,
            stop_ids=tuple(stops),
            pad_id=next(i for i in (pad, eos, terminator_id) if i is not None),
            unwritable=_unwritable(tokenizer, sorted(control)),
        )

    def token_ids(self) -> set[int]:
        """Every id that a prompt, a response or the padding of a batch may hold."""
        tokenizer = self.template.tokenizer
        ordinary = set(tokenizer.get_vocab().values()) - _special_ids(tokenizer)
        return {*ordinary, *_written_ids(self.template), *self.stop_ids, self.pad_id}

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to and including the header of the next assistant turn.

        A trailing assistant turn is the answer to the prompt and left out. Raises DenserlError when
        the template refuses the conversation or rewrites a content.
        """
        return self.tokenize([self.prompt_layout(messages)])[0]

    def encode_response(self, content: str) -> list[int]:
        """Ids of an answer and the terminator, which is the only control token among them."""
        return self.tokenize([self.response_layout(content)])[0]

    def prompt_layout(self, messages: Sequence[Message]) -> Layout:
        """What `encode_prompt` tokenises."""
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages:
            raise DenserlError("no prompt before the answer")
        skeleton, contents = self.template.fill(messages, generation_prompt=True)
        layout: Layout = [skeleton.piece_ids[0]]
        for content, piece in zip(contents, skeleton.piece_ids[1:], strict=True):
            layout += [self._writable(content), piece]
        return layout

    def response_layout(self, content: str) -> Layout:
        """What `encode_response` tokenises."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        skeleton, contents = self.template.fill(turns, generation_prompt=False)
        return [self._writable(contents[skeleton.place(1)]), [self.terminator_id]]

    def pair_layouts(
        self, chosen: Sequence[Message], rejected: Sequence[Message]
    ) -> tuple[Layout, Layout, Layout]:
        """What to tokenise for a preference pair: its prompt, the chosen and the rejected answer.

        Raises DenserlError when a side does not end in an assistant turn, or when the prompts of
        the two sides differ.
        """
        sides = plain_turns(chosen), plain_turns(rejected)
        if any(not side or side[-1]["role"] != "assistant" for side in sides):
            raise DenserlError("a side of the pair does not end in an assistant turn")
        if sides[0][:-1] != sides[1][:-1]:
            raise DenserlError("prompts differ within the pair")
        first, second = (self.response_layout(side[-1]["content"]) for side in sides)
        return self.prompt_layout(sides[0]), first, second

    def tokenize(self, layouts: Sequence[Layout]) -> list[list[int]]:
        """Ids of many layouts at once, which uses all cores."""
        texts = [part for layout in layouts for part in layout if isinstance(part, str)]
        encoded = iter(plain_ids(self.template.tokenizer, texts))
        return [
            [i for part in layout for i in (next(encoded) if isinstance(part, str) else part)]
            for layout in layouts
        ]

    def _writable(self, content: str) -> str:
        for token in self.unwritable:
            if token in content:
                raise DenserlError(f"this tokenizer cannot write {token} as plain text")
        return content


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to and including the header of the next assistant turn (method §3).

    messages: mappings with `role` and `content`; a trailing assistant turn is the answer to the
    prompt and left out. Raises DenserlError when the tokenizer has no usable chat template, or when
    the template refuses the conversation.
    """
    return _format_of(tokenizer, str(tokenizer.chat_template)).encode_prompt(messages)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    *,
    max_length: int,
    max_prompt_length: int,
) -> EncodedPair:
    """Ids of a preference pair, truncated as method §3 has it; responses end with the terminator.

    chosen, rejected: message lists with one and the same prompt, each ending in an assistant turn.
    max_length: tokens of prompt and longer response. max_prompt_length: tokens the prompt keeps
    when they exceed it. Raises DenserlError for pairs and limits that make no sense.
    """
    check_limits(max_length, max_prompt_length)
    chat = _format_of(tokenizer, str(tokenizer.chat_template))
    pair = EncodedPair(*chat.tokenize(chat.pair_layouts(chosen, rejected)))
    return truncate_pair(pair, max_length, max_prompt_length, chat.terminator_id)


def check_limits(max_length: int, max_prompt_length: int) -> None:
    """Raise DenserlError when a prompt could leave no room for a response."""
    if not 0 < max_prompt_length < max_length:
        raise DenserlError(
            f"max_prompt_length {max_prompt_length} must be positive and below max_length "
            f"{max_length}, or a prompt leaves no room for its response",
            hint="lower data.max_prompt_length or raise data.max_length",
        )


def truncate_pair(
    pair: EncodedPair, max_length: int, max_prompt_length: int, terminator_id: int
) -> EncodedPair:
    """Cut the prompt on the left, then both responses on the right, to `max_length` tokens.

    A response that is cut ends with the terminator again (method §3).
    """
    prompt, *responses = pair
    if len(prompt) + max(map(len, responses)) > max_length:
        prompt = prompt[-max_prompt_length:]
    room = max_length - len(prompt)
    cut = [r if len(r) <= room else [*r[: room - 1], terminator_id] for r in responses]
    return EncodedPair(prompt, *cut)


@lru_cache(maxsize=8)
def _format_of(tokenizer: PreTrainedTokenizerBase, template: str) -> ChatFormat:
    """The format of a tokenizer, for as long as its template stays the same."""
    return ChatFormat.of(tokenizer)


def _check_arguments(template: Template, arguments: Mapping[str, Any]) -> None:
    """Raise DenserlError for arguments that would change nothing: most likely a slip."""
    for name in arguments:
        if name not in template.variables:
            near = get_close_matches(name, template.variables, 1)
            raise DenserlError(
                f"chat.template_arguments: the chat template of {template.tokenizer.name_or_path} "
                f"reads no variable {name!r}{f', did you mean {near[0]!r}?' if near else ''}",
                hint="leave it out, or name the tokenizer whose template has it in model.tokenizer",
            )


def _check_ending(template: Template, ending: str) -> None:
    """Raise DenserlError unless prompts, of the kinds that the template takes, end as they must."""
    for roles, skeleton in _prompt_skeletons(template).items():
        last = skeleton.pieces[-1]
        if not last.endswith(ending):
            raise DenserlError(
                f"chat.prompt_ending: a prompt of {', '.join(roles)} ends with {last!r}, not with "
                f"{ending!r}",
                hint="set chat.template_arguments so that it does, or mend chat.prompt_ending",
            )


def _prompt_skeletons(template: Template) -> dict[tuple[str, ...], Skeleton]:
    """The usual kinds of prompt, as far as the template takes them."""
    found = {}
    for roles in _PROMPTS:
        with suppress(DenserlError):  # such as a template without system messages
            found[roles] = template.skeleton(roles, True)
    return found


def _written_ids(template: Template) -> set[int]:
    """Ids that the template itself writes into prompts."""
    skeletons = _prompt_skeletons(template).values()
    return {i for skeleton in skeletons for ids in skeleton.piece_ids for i in ids}


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def _markers(template: Template) -> set[int]:
    """Added tokens that the template writes: control tokens of the format, flagged or not."""
    added = template.tokenizer.added_tokens_decoder
    return {i for i in _written_ids(template) if i in added and added[i].content.strip()}


def _derive_terminator(template: Template, special: set[int]) -> int:
    """The first special token after an answer."""
    skeleton = template.skeleton(("user", "assistant"), False)
    for token_id in skeleton.piece_ids[skeleton.place(1) + 1]:
        if token_id in special:
            return token_id
    raise DenserlError(
        f"the chat template of {template.tokenizer.name_or_path} ends no answer with a special "
        "token",
        hint="name the token that ends an assistant turn in chat.terminator",
    )


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, where: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(token_id, int) or tokenizer.convert_ids_to_tokens(token_id) != token:
        raise DenserlError(
            f"{where}: the tokenizer {tokenizer.name_or_path} has no token {token!r}",
            hint="name a token of its vocabulary",
        )
    return token_id


def _unwritable(tokenizer: PreTrainedTokenizerBase, control_ids: Sequence[int]) -> tuple[str, ...]:
    """Control tokens that come out even of text that is tokenised as plain text."""
    tokens = tokenizer.convert_ids_to_tokens(list(control_ids))
    typed = plain_ids(tokenizer, [f"a {token} b" for token in tokens])
    return tuple(t for i, t, ids in zip(control_ids, tokens, typed, strict=True) if i in ids)
