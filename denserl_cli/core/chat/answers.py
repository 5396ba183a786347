"""Where an answer stands: what a template writes right before an answer's content and after it.

Between the generation prompt and the content many templates write something: a channel, an empty
thought, a blank. Prompts end with it. A blank that makes one token with the first word of an
answer is left to the answer, for no prompt can end with a part of a token.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, NamedTuple

from denserl_cli.core.chat.control import special_ids, token_id
from denserl_cli.core.chat.template import (
    Contradiction,
    Skeleton,
    Template,
    marked_ids,
    name_of,
)
from denserl_cli.core.errors import DenserlError

Roles = tuple[str, ...]

PROMPTS: tuple[Roles, ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
"""The usual kinds of prompt."""

_WORDS = ("Yes", "the", "I", "A ", "1", "你好", "Été")
"""First words of answers."""
_ANOTHER = "name a tokenizer in model.tokenizer whose template writes a question and its answer"


class AnswerFormat(NamedTuple):
    """What surrounds the content of an answer."""

    roles: Roles
    """The shortest prompt that the template takes."""
    beginning: str
    """What prompts end with beyond the template's own generation prompt."""
    lead: str
    """What the template writes before the content and an answer's first token begins with."""
    closing: str
    """What the template writes after the content, up to the end of the terminator."""
    ending: tuple[int, ...]
    """The terminator, where the template itself writes none."""
    anchor: str
    """The end of every prompt from its last added token on: what follows can be tokenised after it
    alone. Empty where there is none."""
    terminator_id: int
    """The token that ends an assistant turn."""

    @classmethod
    def of(
        cls, template: Template, terminator: str | None, *, to_the_end: bool = False
    ) -> AnswerFormat:
        """Read off a template.

        Args:
            template: with its arguments.
            terminator: token that ends an assistant turn; None takes the first special token that
                the template writes after an answer.
            to_the_end: an answer has all that the template writes after it, its last token is the
                terminator.

        Raises:
            DenserlError: a plain question and its answer cannot be written, the prompt contradicts
                the whole conversation, or there is no terminator.
        """
        roles = _shortest_prompt(template)
        try:
            gap = template.beginning(roles)
        except Contradiction as error:
            raise DenserlError(error.message, _way_out(template, roles)) from error
        closing, terminator_id = _closing(template, roles, terminator, to_the_end)
        ending = () if closing or to_the_end else (terminator_id,)
        beginning, lead, anchor = _divided(template, roles, gap, closing)
        return cls(roles, beginning, lead, closing, ending, anchor, terminator_id)

    def check_ending(self, template: Template, ending: str) -> None:
        """Raise DenserlError unless prompts end so, of the kinds that the template takes."""
        for roles, skeleton in prompt_skeletons(template).items():
            last = skeleton.pieces[-1] + self.beginning
            if not last.endswith(ending):
                raise DenserlError(
                    f"chat.prompt_ending: a prompt of {', '.join(roles)} ends with {last!r}, not "
                    f"with {ending!r}",
                    hint="set chat.template_arguments so that it does, or mend chat.prompt_ending",
                )

    def written_ids(self, template: Template) -> set[int]:
        """Ids that the template itself writes."""
        texts = [piece for one in prompt_skeletons(template).values() for piece in one.pieces]
        texts += [self.beginning, self.lead, self.closing]
        return {i for ids in marked_ids(template.tokenizer, texts) for i in ids}


def prompt_skeletons(template: Template) -> dict[Roles, Skeleton]:
    """The usual kinds of prompt, as far as the template takes them."""
    found = {}
    for roles in PROMPTS:
        with suppress(DenserlError):  # such as a template without system messages
            found[roles] = template.skeleton(roles, True)
    return found


def _shortest_prompt(template: Template) -> Roles:
    """The shortest prompt that the template takes with its answer."""
    reasons: list[DenserlError] = []
    for roles in PROMPTS[:2]:
        try:
            template.skeleton(roles, True)
            template.skeleton((*roles, "assistant"), False)
            return roles
        except DenserlError as error:
            reasons.append(error)
    raise _explained(template, reasons[0])


def _explained(template: Template, error: DenserlError) -> DenserlError:
    """Why a template cannot write a plain question and its answer, and what to do about it."""
    name = name_of(template.tokenizer)
    message = error.message.replace("the chat template", f"the chat template of {name}", 1)
    undefined = re.search(r"'(\w+)' is undefined", message)
    if undefined and undefined[1] in template.variables:
        variable = undefined[1]
        return DenserlError(
            f"the chat template of {name} needs {variable}, which nothing defines",
            f"set it in the recipe, chat.template_arguments: {{{variable}: …}}, or name another "
            "tokenizer in model.tokenizer",
        )
    mark = "denserl?"
    parts: Any = [{"type": "text", "text": mark}]
    needs: dict[str, tuple[Any, dict[str, Any]]] = {
        "": (mark, {}),
        "tools": (mark, {"tools": [_TOOL]}),
        "documents": (mark, {"documents": [{"title": "a", "text": "b"}]}),
        "contents that are lists of parts, not text": (parts, {}),
    }
    for needed, (content, arguments) in needs.items():
        with suppress(DenserlError):
            text = template.render([{"role": "user", "content": content}], True, **arguments)
            if mark in text:  # in plain text already: the fault is another one
                wanted = DenserlError(f"the chat template of {name} needs {needed}", _ANOTHER)
                return wanted if needed else DenserlError(message, _ANOTHER)
    return DenserlError(message, _ANOTHER)


_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def _way_out(template: Template, roles: Roles) -> str:
    """The arguments of a template that make its prompts agree with its whole conversations."""
    given = template.given
    for value in (False, True):
        for name in sorted(template.variables - given.keys()):
            with suppress(DenserlError):
                Template(template.tokenizer, {**given, name: value}).beginning(roles)
                written = str(value).lower()
                return f"set chat.template_arguments: {{{name}: {written}}}, then the two agree"
    return (
        "no argument of the template makes the two agree: give the tokenizer a template whose "
        "prompt is the beginning of the whole (tokenizer.chat_template, then save_pretrained) and "
        "name it in model.tokenizer"
    )


def _closing(
    template: Template, roles: Roles, terminator: str | None, to_the_end: bool
) -> tuple[str, int]:
    """What stands after an answer's content up to the end of its terminator, and its id."""
    tokenizer = template.tokenizer
    after = template.skeleton((*roles, "assistant"), False).pieces[-1]
    ids = marked_ids(tokenizer, [after])[0]
    special = special_ids(tokenizer)
    written = [i for i in ids if i in special]
    if to_the_end:
        for last in (*ids[-1:], tokenizer.eos_token_id, tokenizer.sep_token_id):
            if last is not None:
                return after, last
        raise _no_terminator(template, roles)
    if terminator is None:
        if not written:
            raise _no_terminator(template, roles)
        terminator = str(tokenizer.convert_ids_to_tokens(written[0]))
    found = token_id(tokenizer, terminator, "chat.terminator")
    if terminator in after:
        return after[: after.index(terminator) + len(terminator)], found
    if written:
        ends = str(tokenizer.convert_ids_to_tokens(written[0]))
        raise DenserlError(
            f"chat.terminator: the chat template of {name_of(tokenizer)} ends answers with "
            f"{ends!r}, not with {terminator!r}",
            hint="leave chat.terminator out; tokens that end sampled answers, too, are named in "
            "chat.stop_tokens",
        )
    return "", found


def _no_terminator(template: Template, roles: Roles) -> DenserlError:
    """What could end an answer is what begins the next question."""
    tokenizer, special = template.tokenizer, special_ids(template.tokenizer)
    hint = "name the token that ends an assistant turn in chat.terminator"
    with suppress(DenserlError):
        between = template.skeleton((*roles, "assistant", "user"), False).pieces[-2]
        marks = [i for i in marked_ids(tokenizer, [between])[0] if i in special]
        if marks:
            token = str(tokenizer.convert_ids_to_tokens(marks[0]))
            hint += f", such as {token!r}, which begins the next turn"
    return DenserlError(
        f"the chat template of {name_of(tokenizer)} ends no answer with a special token", hint
    )


def _divided(template: Template, roles: Roles, gap: str, closing: str) -> tuple[str, str, str]:
    """What stands before the content, as the prompt's part and the answer's, and the anchor."""
    skeleton = template.skeleton(roles, True)
    asked = skeleton.joined(["Why?"] * len(roles))
    for beginning in dict.fromkeys((gap, gap.rstrip(), "")):
        lead = gap.removeprefix(beginning)
        anchor = _anchor(template, skeleton.pieces[-1] + beginning)
        before = anchor or asked + beginning
        known, *said = marked_ids(
            template.tokenizer, [before, *(before + lead + word + closing for word in _WORDS)]
        )
        if all(ids[: len(known)] == known for ids in said):
            return beginning, lead, anchor
    raise DenserlError(
        f"the chat template of {name_of(template.tokenizer)} ends its prompts with "
        f"{skeleton.pieces[-1][-40:]!r}, the end of which this tokenizer writes in other tokens "
        "when an answer follows",
        hint="give the tokenizer a template without white space at the end of its generation "
        "prompt (tokenizer.chat_template, then save_pretrained) and name it in model.tokenizer",
    )


def _anchor(template: Template, ending: str) -> str:
    """The end of a text from its last added token on; empty without one."""
    tokenizer = template.tokenizer
    added = tokenizer.added_tokens_decoder
    places = {ending.rfind(t.content): i for i, t in added.items() if t.content.strip()}
    whole = marked_ids(tokenizer, [ending])[0]
    for start in sorted(places.keys() - {-1}, reverse=True):
        ids = marked_ids(tokenizer, [ending[start:]])[0]
        if ids[:1] == [places[start]] and whole[-len(ids) :] == ids:
            return ending[start:]
    return ""
