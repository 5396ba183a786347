"""Conversation trees and step labels: rows from which several comparisons are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.data.unusable import UnusableRow, shown

Fields = dict[str, Any]

_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}


def trees_of(rows: Iterable[Row | Skipped]) -> Iterator[Row | Skipped]:
    """Whole trees, also of rows that hold one message each and name their parent.

    Single messages are kept until all rows are read; trees come in the order of their first ones.
    """
    messages: dict[str, tuple[str, Fields]] = {}
    for row in rows:
        if isinstance(row, Skipped) or isinstance(row.fields.get("prompt"), dict):
            yield row
        elif not isinstance(row.fields.get("message_id"), str):
            yield Skipped(row.origin, "no tree", "found neither prompt.replies nor message_id")
        else:
            messages[row.fields["message_id"]] = row.origin, {**row.fields, "replies": []}
    roots = []
    for key, (origin, message) in messages.items():
        parent = message.get("parent_id")
        if parent is None:
            roots.append(key)
        elif parent in messages:
            messages[parent][1]["replies"].append(message)
        else:
            yield Skipped(origin, "no parent", f"column parent_id: no row has {shown(parent)}")
    for key in roots:
        origin, message = messages[key]
        yield Row(origin, {"prompt": message})


def tree_comparisons(fields: Fields) -> Iterator[Fields]:
    """A comparison for each message of a tree that has several ranked answers.

    Deleted messages, and what follows them, are left out. Raises UnusableRow without any.
    """
    found = list(_below(fields["prompt"], []))
    if not found:
        raise UnusableRow("no ranked answers", "no message of the tree has two answers with a rank")
    yield from found


def _below(root: Fields, before: list[dict[str, str]]) -> Iterator[Fields]:
    """The comparisons of a message and of all that follows it."""
    waiting: list[tuple[Fields, list[dict[str, Any]]]] = [(root, before)]
    while waiting:
        message, before = waiting.pop()
        role = _ROLES.get(str(message.get("role")), "")
        if not role or message.get("deleted") is True:
            continue
        here: list[dict[str, Any]] = [*before, {"role": role, "content": message.get("text")}]
        replies = _objects(message.get("replies"))
        kept = [reply for reply in replies if reply.get("deleted") is not True]
        ranked = [reply for reply in kept if reply.get("rank") is not None]
        if role == "user" and len(ranked) > 1:
            yield {
                "prompt": here,
                "answers": [reply.get("text") for reply in ranked],
                "rank": [reply["rank"] for reply in ranked],
            }
        waiting += [(reply, here) for reply in reversed(kept)]


def step_comparisons(fields: Fields) -> Iterator[Fields]:
    """A comparison for each step of a solution whose proposals are rated differently.

    An answer is the steps chosen before and the proposed one, parted by line breaks. Raises
    UnusableRow where no step has two different ratings.
    """
    question, label = fields.get("question"), fields.get("label")
    steps = label.get("steps") if isinstance(label, dict) else None
    problem = question.get("problem") if isinstance(question, dict) else None
    if not isinstance(steps, list) or not isinstance(problem, str):
        raise UnusableRow("no steps", "wanted question.problem and label.steps")
    before, found = list[str](), False
    for step in _objects(steps):
        proposals = [
            one
            for one in _objects(step.get("completions"))
            if isinstance(one.get("rating"), int | float) and isinstance(one.get("text"), str)
        ]
        if len({one["rating"] for one in proposals}) > 1:
            found = True
            yield {
                "prompt": problem,
                "answers": ["\n".join([*before, one["text"]]) for one in proposals],
                "scores": [one["rating"] for one in proposals],
            }
        chosen = _chosen_step(step)
        if chosen is None:
            break
        before.append(chosen)
    if not found:
        raise UnusableRow("no step to compare", "no step has proposals with different ratings")


def _chosen_step(step: Fields) -> str | None:
    """The text with which a solution goes on; None where it ends."""
    completions, place = step.get("completions"), step.get("chosen_completion")
    chosen = step.get("human_completion")
    if isinstance(completions, list) and isinstance(place, int) and 0 <= place < len(completions):
        chosen = completions[place]
    text = chosen.get("text") if isinstance(chosen, dict) else None
    return text if isinstance(text, str) else None


def _objects(value: object) -> list[Fields]:
    """The objects of a list; none of what is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
