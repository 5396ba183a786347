"""Columns that nobody reads: which of them may hold a part of the prompt."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from denserl_cli.core.data.column_paths import is_there
from denserl_cli.core.data.messages import Turns
from denserl_cli.core.recipe.data_formats import DATA_FORMATS
from denserl_cli.core.recipe.schema import DataFormat

_WORDS = re.compile(r"[A-Za-z]+")
_UNSPACED = re.compile(r"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff]{2}")
"""Two characters of a script that is written without blanks: about a word."""
_QUESTION_WORDS = frozenset(
    "question questions instruction instructions query queries input inputs trajectory context "
    "contexts history problem post conversation conversations dialog dialogue message messages "
    "document documents passage article background user human request prompt turns premise "
    "scenario story utterance body title situation system persona".split()
)
_INPUT_WORDS = frozenset(
    "question instruction query input inputs context history premise problem system".split()
)
"""Last words of columns of which a single word belongs to the prompt as well."""
_NOTHING = frozenset(("[]", "{}", "null", "none", "nan", "n/a", "-"))
_METADATA_WORDS = frozenset(
    "id ids uid uuid hash model models url link date time timestamp tstamp created updated score "
    "scores rating ratings label labels rank ranks margin license version generator generators "
    "annotator annotators annotations labeler judge index status meta metadata info rationale "
    "rationales explanation feedback critique comment comments winner preference preferences "
    "better safer toxicity quality difficulty length tokens token count counts author reason "
    "reasons reasoning confidence principle principles evaluation evaluations order generation "
    "generations tools".split()
)
_CATEGORY_WORDS = frozenset(
    "source sources origin subset split lang language languages locale category categories domain "
    "topic tag tags type types task tasks dataset name key keys".split()
)
_ANSWER = re.compile(
    r"(?:chosen|rejected|response|completion|answer|output|target|reply|candidate)(?:_?(?:[a-d]|\d+))?",
    re.IGNORECASE,
)
_CATEGORY_LENGTH = 6
"""Words that the name of a category may have."""
_MEDIA_WORDS = frozenset("image images video videos audio audios picture pictures".split())
_TOO_GENERIC = ("hh-rlhf", "shared-beginning")
"""Formats whose columns say nothing about them."""


class LeftOut(NamedTuple):
    """Columns with text that is in no conversation of the row.

    questions: whose names say that they belong to a prompt. others: with other names. media:
    with images, sounds or films.
    """

    questions: list[str]
    others: list[str]
    media: list[str]


def left_out(fields: Mapping[str, Any], used: Collection[str], sides: Sequence[Turns]) -> LeftOut:
    """The columns with text that is not read, apart from `used` ones and metadata."""
    found = LeftOut([], [], [])
    read = "\n".join(turn["content"] for side in sides for turn in side)
    asked = "\n".join(turn["content"] for side in sides for turn in _prompt_of(side))
    for name, value in fields.items():
        if not _MEDIA_WORDS.isdisjoint(_words(name)) and value not in (None, "", [], {}):
            found.media.append(name)
        is_input = _words(name)[-1:] and _words(name)[-1] in _INPUT_WORDS
        if name in used or _is_metadata(name, value) or not (is_input or _has_words(value)):
            continue
        texts = [text.strip() for text in _texts(value) if text.strip().lower() not in _NOTHING]
        question = _is_question(name)
        in_prompt = any(text in asked for text in texts) or not question
        if all(text in read for text in texts) and (in_prompt or not texts):
            continue
        (found.questions if question else found.others).append(name)
    return found


def candidates(fields: Mapping[str, Any]) -> list[str]:
    """The columns that may hold a prompt, those with a telling name first."""
    names = [
        name
        for name, value in fields.items()
        if not _ANSWER.fullmatch(name) and not _is_metadata(name, value) and any(_texts(value))
    ]
    return sorted(names, key=lambda name: not _is_question(name))


def fitting_formats(fields: Mapping[str, Any]) -> list[DataFormat]:
    """The known formats that a row looks like."""
    return [
        name
        for name, mappings in DATA_FORMATS.items()
        if name not in _TOO_GENERIC
        and any(all(is_there(fields, path) for path in mapping.needs) for mapping in mappings)
    ]


def _prompt_of(side: Turns) -> Turns:
    """A conversation without its last answer."""
    return side[:-1] if side and side[-1]["role"] == "assistant" else side


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)))]


def _is_metadata(name: str, value: object) -> bool:
    """Whether a column's name says that it is about the row, and its value does not deny it."""
    words = _words(name)
    if not words or words[-1] in _METADATA_WORDS:
        return bool(words)
    short = all(_length(text) < _CATEGORY_LENGTH for text in _texts(value))
    if words[-1] in _CATEGORY_WORDS:
        return short
    about = words[0] in _METADATA_WORDS or (words[0] in _CATEGORY_WORDS and short)
    return about and _QUESTION_WORDS.isdisjoint(words)


def _is_question(name: str) -> bool:
    return not _QUESTION_WORDS.isdisjoint(_words(name))


def _has_words(value: object) -> bool:
    """Whether a value holds a text of several words."""
    return any(_length(text) > 1 for text in _texts(value))


def _length(text: str) -> int:
    """About how many words a text has, also in scripts that are written without blanks."""
    return len(text.split()) + len(_UNSPACED.findall(text))


def _texts(value: object) -> Iterator[str]:
    """All texts in a value that are not blank; keys and roles apart."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "from", "type"):
                yield from _texts(item)
