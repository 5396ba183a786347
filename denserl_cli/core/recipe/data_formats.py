"""Known data formats: where well-known data sets keep their columns, as mappings one can change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from denserl_cli.core.recipe.schema import (
    BetterValues,
    Columns,
    DataFormat,
    MessageKeys,
    Pairing,
    Source,
)

Reader = Literal["shared-beginning", "steer-turns", "turn-lists", "message-trees", "step-labels"]

PLAIN_COLUMNS = Columns(prompt="prompt", chosen="chosen", rejected="rejected", margin="margin")
"""What a source's columns are laid over where it names no format."""
_ANSWER_GROUPS = (("chosen", "rejected"), ("answers",))
_PREFERENCE_GROUPS = (("better",), ("scores",), ("rank",))


@dataclass(frozen=True)
class RowMapping:
    """How the rows of a source are read: its settings, completed by those of its format."""

    columns: Columns | None = None
    """None: the plain layout, `prompt`, `chosen`, `rejected` and `messages`."""
    roles: dict[str, Any] = field(default_factory=dict)
    message_keys: MessageKeys | None = None
    pairs: Pairing | None = None
    ties: Literal["skip", "keep-as-half"] = "skip"
    group_by: str | None = None
    reader: Reader | None = None
    """Code that rewrites the rows before columns are looked up (`core.data.row_readers`)."""
    needs: tuple[str, ...] = ()
    """Paths by which rows of the format are recognised."""

    @property
    def reads_whole_source(self) -> bool:
        """Whether a comparison may be spread over several rows."""
        return self.group_by is not None or self.reader == "message-trees"


def _mapping(
    needs: str,
    *,
    reader: Reader | None = None,
    pairs: Pairing | None = None,
    group_by: str | None = None,
    **columns: Any,
) -> RowMapping:
    return RowMapping(
        Columns(**columns),
        reader=reader,
        pairs=pairs,
        group_by=group_by,
        needs=tuple(needs.split()),
    )


_SIGN: BetterValues = "sign"
_LISTS: dict[str, Any] = {"prompt": "prompt", "chosen": "chosen[*]", "rejected": "rejected[*]"}
_SIDES: dict[str, Any] = {"chosen": "chosen", "rejected": "rejected"}

DATA_FORMATS: dict[DataFormat, tuple[RowMapping, ...]] = {
    "hh-rlhf": (_mapping("chosen rejected", **_SIDES),),
    "shared-beginning": (
        _mapping("chosen rejected", reader="shared-beginning", prompt="prompt", **_SIDES),
    ),
    "ultrafeedback": (
        _mapping("prompt chosen rejected score_chosen", prompt="prompt", **_SIDES),
        _mapping(
            "instruction completions",
            prompt="instruction",
            answers="completions[*].response",
            scores="completions[*].fine-grained_score",
        ),
        _mapping(
            "instruction chosen_response rejected_response",
            prompt="instruction",
            chosen="chosen_response",
            rejected="rejected_response",
        ),
    ),
    "helpsteer2": (
        _mapping(
            "prompt response_1 response_2 preference_strength",
            reader="steer-turns",
            prompt="prompt",
            answers=("response_1", "response_2"),
            better="preference_strength",
            better_values=_SIGN,
        ),
        _mapping(
            "prompt response helpfulness",
            reader="steer-turns",
            group_by="prompt",
            prompt="prompt",
            answers="response",
            scores="helpfulness",
        ),
    ),
    "helpsteer3": (
        _mapping(
            "context response1 response2 overall_preference",
            prompt="context",
            answers=("response1", "response2"),
            better="overall_preference",
            better_values=_SIGN,
        ),
    ),
    "nectar": (
        _mapping(
            "prompt answers[0].answer answers[0].rank",
            prompt="prompt",
            answers="answers[*].answer",
            rank="answers[*].rank",
        ),
    ),
    "shp": (
        _mapping(
            "history human_ref_A human_ref_B labels",
            prompt="history",
            answers=("human_ref_B", "human_ref_A"),  # labels: 1 where A is preferred
            better="labels",
            better_values="index-from-0",
        ),
    ),
    "webgpt": tuple(
        _mapping(
            f"{question} answer_0 answer_1 score_0 score_1",
            prompt=question,
            answers=("answer_0", "answer_1"),
            scores=("score_0", "score_1"),
        )
        for question in ("question.full_text", "question")
    ),
    "arena-human": (
        _mapping(
            "conversation_a conversation_b winner",
            answers=("conversation_a", "conversation_b"),
            better="winner",
        ),
        _mapping(
            "prompt response_a response_b winner_model_a winner_model_b",
            reader="turn-lists",
            answers=("conversation_a", "conversation_b"),
            scores=("winner_model_a", "winner_model_b"),
        ),
        _mapping(
            "prompt response_a response_b winner",
            prompt="prompt",
            answers=("response_a", "response_b"),
            better="winner",
        ),
    ),
    "judgebench": (
        _mapping(
            "question response_A response_B label",
            prompt="question",
            answers=("response_A", "response_B"),
            better="label",
        ),
    ),
    "rm-bench": (_mapping("prompt chosen[0] rejected[0] domain", pairs="product", **_LISTS),),
    "reward-bench-2": (
        _mapping("prompt chosen[0] rejected[0] num_correct", pairs="product", **_LISTS),
    ),
    "alpaca-farm": (
        _mapping(
            "instruction output_1 output_2 preference",
            prompt=("instruction", "input"),
            answers=("output_1", "output_2"),
            better="preference",
            better_values="index-from-1",
        ),
    ),
    "sharegpt-dpo": (_mapping("conversations chosen rejected", prompt="conversations", **_SIDES),),
    "orca-dpo": tuple(
        _mapping(f"{question} chosen rejected system", prompt=question, system="system", **_SIDES)
        for question in ("question", "input")
    ),
    "pku-saferlhf": (
        _mapping(
            "prompt response_0 response_1 better_response_id",
            prompt="prompt",
            answers=("response_0", "response_1"),
            better="better_response_id",
            better_values="index-from-0",
        ),
    ),
    "oasst": tuple(
        _mapping(
            needs, reader="message-trees", prompt="prompt", answers="answers[*]", rank="rank[*]"
        )
        for needs in ("prompt.replies", "message_id text role")
    ),
    "prm800k": (
        _mapping(
            "question.problem label.steps",
            reader="step-labels",
            prompt="prompt",
            answers="answers[*]",
            scores="scores[*]",
        ),
    ),
    "kto": (
        _mapping(
            "prompt completion label",
            group_by="prompt",
            pairs="product",
            prompt="prompt",
            answers="completion",
            scores="label",
        ),
    ),
}
"""The layouts of each format; a source is read by the first one that fits its first row."""


def row_mappings(source: Source) -> tuple[RowMapping, ...]:
    """The layouts that a source may have: one, or those of its format with its own changes."""
    named = DATA_FORMATS[source.format] if source.format else (RowMapping(),)
    return tuple(_changed(mapping, source) for mapping in named)


def _changed(mapping: RowMapping, source: Source) -> RowMapping:
    """A mapping with what the source says itself."""
    given: dict[str, Any] = {"ties": source.ties, "roles": {**mapping.roles, **source.roles}}
    for name in ("message_keys", "pairs", "group_by"):
        if getattr(source, name) is not None:
            given[name] = getattr(source, name)
    if source.columns is not None:
        given["columns"] = _merged(mapping.columns or PLAIN_COLUMNS, source.columns)
    return replace(mapping, **given)


def _merged(base: Columns, over: Columns) -> Columns:
    """Columns of a format with a source's own; `answers` replaces `chosen`, `scores` `better`."""
    own = {name: value for name, value in given_columns(over).items()}
    kept = given_columns(base)
    for groups in (_ANSWER_GROUPS, _PREFERENCE_GROUPS):
        if any(name in own for group in groups for name in group):
            for group in groups:
                if not any(name in own for name in group):
                    kept = {name: value for name, value in kept.items() if name not in group}
    return Columns(**{**kept, **own})


def given_columns(columns: Columns) -> dict[str, Any]:
    """The columns that are named, by field."""
    values = {one.name: getattr(columns, one.name) for one in fields(Columns)}
    return {name: value for name, value in values.items() if value is not None}


def mapping_settings(mapping: RowMapping) -> dict[str, Any]:
    """What a source would say for this mapping, without what it leaves at its default."""
    settings: dict[str, Any] = {}
    if mapping.columns is not None:
        settings["columns"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given_columns(mapping.columns).items()
        }
    if mapping.message_keys is not None:
        keys = mapping.message_keys
        settings["message_keys"] = {"role": keys.role, "content": keys.content}
    for name in ("roles", "pairs", "group_by"):
        if getattr(mapping, name):
            settings[name] = getattr(mapping, name)
    if mapping.ties != "skip":
        settings["ties"] = mapping.ties
    return settings


def reading_settings(source: Source) -> Mapping[str, Any]:
    """Everything in a source that decides how a row is read, as JSON can hold it."""
    return {
        "format": source.format,
        "mappings": [mapping_settings(mapping) for mapping in row_mappings(source)],
    }
