"""What a row of data may look like, and what makes it unusable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from denserl_cli.core.data.column_paths import look_up, top_column
from denserl_cli.core.data.comparisons import (
    Comparison,
    PairRow,
    answer_levels,
    named_values,
    pair_row,
    paths_of,
    ranked_pairs,
    ranking,
    read_margin,
)
from denserl_cli.core.data.messages import MessageReader, Turns, plain_text
from denserl_cli.core.data.row_checks import (
    SYSTEM_COLUMNS,
    check_answers,
    check_read,
    check_roles,
    check_same_prompt,
    format_advice,
    found_columns,
    no_answer_detail,
    no_prompt_detail,
    with_system,
)
from denserl_cli.core.data.unread_columns import left_out
from denserl_cli.core.data.unusable import TIE, UnusableRow, shown
from denserl_cli.core.recipe.data_formats import RowMapping, given_columns
from denserl_cli.core.recipe.schema import Columns

_NO_TOOLS: tuple[object, ...] = (None, "", "[]", "null", [], {})
_RESPONSES = ("response", "completion", "answer")
ANSWER_HAS_PROMPT = "answer repeats the prompt"
NO_SYSTEM_COLUMN, UNREAD = "no system column: ", "unread: "


class RowReader:
    """Reads the rows of one source as its mapping says."""

    def __init__(self, mapping: RowMapping | None = None) -> None:
        self.mapping = mapping or RowMapping()
        self.messages = MessageReader(self.mapping.roles, self.mapping.message_keys)

    @property
    def remarks(self) -> set[str]:
        """What is to be said about the row that was read last; cleared by whoever reads."""
        return self.messages.remarks

    def pairs(self, fields: Mapping[str, Any]) -> list[PairRow]:
        """The preference pairs of a row, or its ranking. Raises UnusableRow when it gives none."""
        comparison, how = self.comparison(fields), self.mapping.pairs
        if how == "ranking":
            return [pair_row(comparison, *ranking(comparison))]
        if how is None:
            how = "product" if self._columns(fields).chosen is not None else "best-worst"
        answers, pairs = comparison.answers, []
        ranked = ranked_pairs(comparison.levels, how, self.mapping.ties)
        if not ranked:
            raise UnusableRow(TIE, "no answer is better than another; see `ties`")
        for better, worse in ranked:
            if answers[better] != answers[worse]:
                pairs.append(pair_row(comparison, better, worse))
        if not pairs:
            raise UnusableRow("identical answers")
        return pairs

    def comparison(self, fields: Mapping[str, Any]) -> Comparison:
        """The answers of a row, ranked.

        Raises:
            UnusableRow: it has no prompt, no two answers, or does not say which is better.
        """
        columns = self._columns(fields)
        values, levels = self._answers(fields, columns)
        sides = self._conversations(fields, columns, values)
        prompt = sides[0][:-1]
        for side in sides:
            check_roles(side)
            if side[:-1] != prompt:
                raise UnusableRow("prompts differ within the pair")
        answers = [side[-1]["content"] for side in sides]
        kept = [place for place, answer in enumerate(answers) if answer.strip()]
        if len(kept) < 2 or len({levels[place] for place in kept}) < min(2, len(set(levels))):
            empty = next(place for place, answer in enumerate(answers) if not answer.strip())
            raise UnusableRow("empty answer", f"column {values[empty][0]}")
        if not self.mapping.needs:  # neither a known format nor one of its layouts
            self._check_unread(fields, columns, sides)
        return Comparison(
            prompt,
            tuple(answers[place] for place in kept),
            tuple(levels[place] for place in kept),
            read_margin(fields, columns),
        )

    def prompt(self, fields: Mapping[str, Any]) -> tuple[Turns, dict[str, Any]]:
        """The prompt of a row and the columns that are not part of it.

        Accepted without a mapping are `prompt` (text or messages), `messages` and `chosen`; an
        answer at the end is left out.

        Raises:
            UnusableRow: there is no prompt.
        """
        columns, used = self.mapping.columns, set[str]()
        if columns is None:
            turns, name = self._plain_prompt(fields)
            used.add(name)
            columns = Columns()
        elif columns.prompt is not None:
            turns = self._prompt(fields, columns)
            used |= {top_column(path, fields) for path in paths_of(columns.prompt)}
        else:
            values, _ = self._answers(fields, columns, ranked=False)
            turns = self._conversations(fields, columns, values[:1])[0]
        system = self._system(fields, columns, used)
        turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        turns = with_system(turns, system)
        check_roles([*turns, {"role": "assistant", "content": ""}])
        if self.mapping.columns is None:
            for name in left_out(fields, used | set(SYSTEM_COLUMNS), [turns]).questions:
                self.remarks.add(f"{UNREAD}{name}")
        return turns, {key: value for key, value in fields.items() if key not in used}

    def conversations(self, fields: Mapping[str, Any]) -> dict[str, Turns]:
        """The conversations of a row whose last turns are to be scored, by their side.

        Accepted are preference pairs (sides chosen and rejected) and, with the side "", `messages`
        and a `prompt` beside a `response`, `completion` or `answer`.

        Raises:
            UnusableRow: there is none of them.
        """
        if fields.get("chosen") is not None and fields.get("rejected") is not None:
            pair = self.pairs(fields)[0]
            return {"chosen": pair.chosen, "rejected": pair.rejected}
        if fields.get("messages") is not None:
            turns = self._plain_turns(fields, "messages")
            turns = with_system(turns, self._system(fields, Columns(), set()))
        else:
            name = next((name for name in _RESPONSES if fields.get(name) is not None), None)
            if name is None:
                known = ", ".join(("messages", *_RESPONSES))
                raise UnusableRow("no response", f"none of {known} is there, nor a pair")
            asked = None if fields.get("prompt") is None else "prompt"
            turns = self._conversations(fields, Columns(prompt=asked), [(name, fields[name])])[0]
        check_roles(turns)
        check_read(fields, turns)
        if not turns[-1]["content"].strip():
            raise UnusableRow("empty answer")
        return {"": turns}

    def _columns(self, fields: Mapping[str, Any]) -> Columns:
        """The mapping's columns, or those of the plain layout that a row has."""
        if self.mapping.columns is not None:
            return self.mapping.columns
        return Columns(
            prompt=None if fields.get("prompt") is None else "prompt",
            chosen="chosen",
            rejected="rejected",
            margin="margin",
        )

    def _answers(
        self, fields: Mapping[str, Any], columns: Columns, *, ranked: bool = True
    ) -> tuple[list[tuple[str, Any]], list[float]]:
        """The values of the answers with their paths, and how good they are."""
        if columns.answers is not None:
            paths = paths_of(columns.answers)
            values = named_values(fields, paths)
            self._check_given(fields, values or [(paths[0], None)])
            levels = answer_levels(fields, columns, values) if ranked else []
        else:
            both = [named_values(fields, paths_of(p)) for p in (columns.chosen, columns.rejected)]
            for path, found in zip((columns.chosen, columns.rejected), both, strict=True):
                self._check_given(fields, found or [(str(path), None)])
            values, levels = [*both[0], *both[1]], [1.0] * len(both[0]) + [0.0] * len(both[1])
        if ranked and len(values) < 2:
            raise UnusableRow("one answer alone", f"column {values[0][0]}: nothing to compare with")
        return values, levels

    def _check_given(self, fields: Mapping[str, Any], values: Sequence[tuple[str, Any]]) -> None:
        plain = self.mapping.columns is None
        for path, value in values:
            if value is None or value == []:
                raise UnusableRow(f"no {path}", no_answer_detail(fields, path, plain=plain))
            texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
            if plain and texts:
                raise UnusableRow(
                    "several answers",
                    f"column {path}: found a list of {len(value)} texts, wanted one answer; or set "
                    f"columns.{path}: {path}[*]{format_advice(fields)}",
                )

    def _conversations(
        self, fields: Mapping[str, Any], columns: Columns, values: Sequence[tuple[str, Any]]
    ) -> list[Turns]:
        """The whole conversation of each answer; an answer alone continues the prompt."""
        kinds = {isinstance(value, str) for _, value in values}
        if len(kinds) == 2:
            raise UnusableRow("wrong type", "one answer is text, another is not")
        check_answers(fields, values)
        sides = [self.messages.answer(value, path) for path, value in values]
        alone = [len(side) == 1 and side[0]["role"] == "assistant" for side in sides]
        if columns.prompt is not None and (any(alone) or self._has_prompt(fields, columns)):
            prompt = self._prompt(fields, columns)
            if not all(alone):
                check_same_prompt(prompt, sides[alone.index(False)], columns)
            if all(alone):
                self._note_repeated(prompt, sides)
            sides = [prompt + side if one else side for side, one in zip(sides, alone, strict=True)]
        elif any(alone):
            raise UnusableRow("no prompt", no_prompt_detail(fields))
        used = {top_column(path, fields) for path in paths_of(columns.prompt)}
        system = self._system(fields, columns, used)
        return [with_system(side, system) for side in sides]

    def _has_prompt(self, fields: Mapping[str, Any], columns: Columns) -> bool:
        return any(look_up(fields, path) not in (None, "", []) for path in paths_of(columns.prompt))

    def _prompt(self, fields: Mapping[str, Any], columns: Columns) -> Turns:
        """The turns of all columns of the prompt; texts that follow each other are one turn."""
        turns: Turns = []
        for path in paths_of(columns.prompt):
            value = look_up(fields, path)
            if value is None or value == [] or (isinstance(value, str) and not value.strip()):
                continue
            part = self.messages.prompt(value, path)
            if turns and part and turns[-1]["role"] == part[0]["role"] == "user":
                text = f"{turns[-1]['content']}\n\n{part[0]['content']}"
                turns, part = [*turns[:-1], {"role": "user", "content": text}], part[1:]
            turns += part
        if not turns:
            names = ", ".join(paths_of(columns.prompt))
            raise UnusableRow("no prompt", f"column {names} is empty; {found_columns(fields)}")
        return turns

    def _plain_prompt(self, fields: Mapping[str, Any]) -> tuple[Turns, str]:
        """The turns of a row without a mapping, and the column that they are in."""
        names = ("prompt", "messages", "chosen")
        name = next((name for name in names if fields.get(name) is not None), None)
        if name is None:
            raise UnusableRow("no prompt", no_prompt_detail(fields))
        if name == "prompt":
            return self.messages.prompt(fields[name], name), name
        return self._plain_turns(fields, name), name

    def _plain_turns(self, fields: Mapping[str, Any], name: str) -> Turns:
        """The turns of a column of whole conversations."""
        turns = self.messages.turns(fields[name], name)
        if turns is None:
            raise UnusableRow(
                "no prompt" if name == "chosen" else "wrong type",
                f"column {name}: found a text without speakers {shown(fields[name])}, wanted "
                f"messages{format_advice(fields)}",
            )
        return turns

    def _system(self, fields: Mapping[str, Any], columns: Columns, used: set[str]) -> str | None:
        """The system message that a column of its own holds; the column is then used."""
        names = (columns.system,) if columns.system else SYSTEM_COLUMNS
        for path in names:
            if not columns.system and (path in used or path not in fields):
                continue
            if columns.system and top_column(path, fields) not in fields:
                self.remarks.add(f"{NO_SYSTEM_COLUMN}{path}")
            value = look_up(fields, path)
            if isinstance(value, list | dict) and value:
                turns = self.messages.messages(value, path)
                value = "\n\n".join(turn["content"] for turn in turns)
            if value is None or value == [] or (isinstance(value, str) and not value.strip()):
                continue
            used.add(top_column(path, fields))
            return plain_text(value, path)
        return None

    def _note_repeated(self, prompt: Turns, sides: Sequence[Turns]) -> None:
        text = prompt[-1]["content"].strip() if prompt else ""
        if text and all(side[0]["content"].lstrip().startswith(text) for side in sides):
            self.remarks.add(ANSWER_HAS_PROMPT)

    def _check_unread(
        self, fields: Mapping[str, Any], columns: Columns, sides: Sequence[Turns]
    ) -> None:
        """Refuse a plain row with a column that may belong to its prompt and is not read.

        Where the source names its columns, or for other columns, it is merely said.
        """
        named = (value for value in given_columns(columns).values() if not isinstance(value, dict))
        used = {top_column(path, fields) for value in named for path in paths_of(value)}
        unread = left_out(fields, used | set(SYSTEM_COLUMNS), sides)
        if unread.media and self.mapping.columns is None:
            names = ", ".join(unread.media)
            raise UnusableRow("needs more than text", f"column {names} belongs to the prompt")
        names = ", ".join(unread.questions)
        if names and self.mapping.columns is None:
            raise UnusableRow(
                "a column is left out",
                f"column {names} may belong to the prompt and is not part of it: name in `columns` "
                f"what is to be read, such as {{prompt: [{names}, prompt]}}, or {{prompt: prompt}} "
                "without it",
            )
        for name in unread.questions:
            self.remarks.add(f"{UNREAD}{name}")
        if self.mapping.columns is not None:
            return
        for name in unread.others:
            self.remarks.add(f"{UNREAD}{name}")


_PLAIN = RowReader()


def pair_of(fields: Mapping[str, Any]) -> PairRow:
    """Read the preference pair of a row in the plain layout. Raises UnusableRow."""
    return _PLAIN.pairs(fields)[0]


def prompt_of(fields: Mapping[str, Any]) -> tuple[Turns, dict[str, Any]]:
    """Read the prompt of a row in the plain layout, and its other columns. Raises UnusableRow."""
    return _PLAIN.prompt(fields)


def conversations_of(fields: Mapping[str, Any]) -> dict[str, Turns]:
    """Read what is to be scored of a row in the plain layout. Raises UnusableRow."""
    return _PLAIN.conversations(fields)


def has_tools(fields: Mapping[str, Any]) -> bool:
    """Whether a row offers the model tools, which prompts leave out."""
    return fields.get("tools") not in _NO_TOOLS
