"""Checks of what was read of a row, and the words in which it is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from denserl_cli.core.data.comparisons import paths_of
from denserl_cli.core.data.messages import Turns
from denserl_cli.core.data.unread_columns import candidates, fitting_formats, left_out
from denserl_cli.core.data.unusable import UnusableRow, shown
from denserl_cli.core.recipe.schema import Columns

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
"""Columns that hold a system message where a source names none."""


def with_system(turns: Turns, system: str | None) -> Turns:
    """A conversation that begins with a system message, if there is one."""
    if system is None:
        return turns
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"].strip() == system.strip():
            return turns
        raise UnusableRow(
            "two system messages", "the conversation begins with another than the column has"
        )
    return [{"role": "system", "content": system}, *turns]


def check_same_prompt(prompt: Turns, side: Turns, columns: Columns) -> None:
    """Raise UnusableRow when a prompt of its own says what a whole conversation does not."""
    whole = [turn["content"].strip() for turn in side]
    for turn in prompt:
        text = turn["content"].strip()
        if text and not any(text in other or (other and other in text) for other in whole):
            names = ", ".join(paths_of(columns.prompt))
            raise UnusableRow(
                "prompts differ within the pair",
                f"column {names} has {shown(text)}, which is not in the whole conversation beside "
                "it; name the column to be read in `columns`",
            )


def check_answers(fields: Mapping[str, Any], values: Sequence[tuple[str, Any]]) -> None:
    """Raise UnusableRow where all answers are the names of other columns, which hold the texts."""
    texts = [value for _, value in values]
    paths = {path for path, _ in values}
    if all(isinstance(text, str) and text in fields and text not in paths for text in texts):
        raise UnusableRow(
            "an answer is the name of a column",
            f"column {values[0][0]}: found {shown(texts[0])}; if that column has the answer, set "
            f"columns: {{answers: [{', '.join(sorted(set(texts)))}], better: {values[0][0]}}}",
        )


def check_read(fields: Mapping[str, Any], turns: Turns) -> None:
    """Raise UnusableRow for a column that may belong to the prompt of what is to be scored."""
    names = ", ".join(left_out(fields, ("prompt", *SYSTEM_COLUMNS), [turns]).questions)
    if names:
        raise UnusableRow(
            "a column is left out",
            f"column {names} may belong to the prompt and is not read: make it part of prompt or "
            "messages, or remove it",
        )


def no_prompt_detail(fields: Mapping[str, Any]) -> str:
    """Where the prompt of a row may be, and how to say so."""
    names = [name for name in candidates(fields) if name not in SYSTEM_COLUMNS]
    if not names:
        return f"{found_columns(fields)}; wanted prompt, or whole conversations"
    named = ", ".join(names)
    return (
        f"column {named} may hold it; wanted prompt, or say where it is: "
        f"columns: {{prompt: {named if len(names) == 1 else f'[{named}]'}}}{format_advice(fields)}"
    )


def no_answer_detail(fields: Mapping[str, Any], path: str, *, plain: bool) -> str:
    """The columns of a row that has no answer at `path`, and what to say in the recipe.

    plain: whether the source names neither columns nor a format.
    """
    found = found_columns(fields)
    if plain and (advice := format_advice(fields)):
        return found + advice
    if not plain or path in fields:
        return found
    example = "columns: {prompt: QUESTION, chosen: BETTER, rejected: WORSE}"
    return (
        f"{found}; where they have other names, say which: {example}; where a score, rank or vote "
        "says which answer is better, see Mappings in docs/data.md"
    )


def found_columns(fields: Mapping[str, Any]) -> str:
    """The columns of a row, in words."""
    return f"found columns {', '.join(map(str, fields))}"


def format_advice(fields: Mapping[str, Any]) -> str:
    """The known format that a row looks like, as the end of a sentence; empty for none."""
    formats = fitting_formats(fields)
    return f"; this looks like format: {' or '.join(formats)}" if formats else ""


def check_roles(turns: Turns) -> None:
    """Perhaps a system message, then user and assistant by turns, assistant last."""
    roles = [turn["role"] for turn in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if talk != ["user", "assistant"] * (len(talk) // 2) or not talk:
        raise UnusableRow("roles in the wrong order", ", ".join(roles))
