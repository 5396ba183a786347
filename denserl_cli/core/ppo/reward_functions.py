"""Reward functions: Python functions of the user among the sources of rewards."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from denserl_cli.core.chat.decoding import segment_texts
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.ppo.sources.record import LAWS, NAMES, Inputs, Law
from denserl_cli.core.recipe.functions import (
    PREFIX,
    installed,
    module_and_name,
    see_current_folder,
    why_not,
)
from denserl_cli.core.system.distributed import rank, world_size

if TYPE_CHECKING:
    from denserl_cli.core.data.conversations import Prompt
    from denserl_cli.core.ppo.rewards import RewardSettings
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.resolved import ResolvedRecipe

_LARGEST = 3e38
"""Beyond it, a float32 is infinite."""
Value = float | list[float]
"""What a function returns for one response."""


class Segment(NamedTuple):
    """A segment as a reward function sees it: its text, its first and its last token."""

    text: str
    start: int
    end: int


class Responses:
    """The responses of this process's rows, in each form that a function can ask for."""

    NAMES = (
        *("prompts", "messages", "responses", "token_ids", "segments", "terminated", "rows"),
        "recipe",
    )

    def __init__(
        self,
        recipe: ResolvedRecipe,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        rollout: Rollout,
        inputs: Inputs,
    ) -> None:
        self.recipe, self.tokenizer, self.rollout = recipe, tokenizer, rollout
        self.inputs = inputs
        self.rows = range(rank(), len(prompts), world_size())
        self.prompts = [prompts[row] for row in self.rows]
        self.ids = [rollout.responses[row].tolist() for row in self.rows]

    def arguments(self, names: Sequence[str]) -> dict[str, Any]:
        """The arguments of these names, copied, because a function may change them."""
        return {
            name: getattr(self, f"_{name}")() if name in self.NAMES else self._tensor(name)
            for name in names
        }

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self.inputs, name)
        return tensor[torch.tensor(self.rows, device=tensor.device)]

    def _prompts(self) -> list[str]:
        return [prompt.messages[-1]["content"] for prompt in self.prompts]

    def _messages(self) -> list[list[dict[str, str]]]:
        return [[dict(message) for message in prompt.messages] for prompt in self.prompts]

    def _responses(self) -> list[str]:
        return list(self.tokenizer.batch_decode(self.ids, skip_special_tokens=True))

    def _token_ids(self) -> list[list[int]]:
        return [list(ids) for ids in self.ids]

    def _terminated(self) -> list[bool]:
        return [bool(self.rollout.terminated[row]) for row in self.rows]

    def _rows(self) -> list[dict[str, Any]]:
        return [deepcopy(prompt.row) for prompt in self.prompts]

    def _recipe(self) -> ResolvedRecipe:
        return self.recipe

    def _segments(self) -> list[list[Segment]]:
        found = []
        for row, ids in zip(self.rows, self.ids, strict=True):
            ends = torch.nonzero(self.rollout.ends[row])[:, 0].tolist()
            starts = [0, *(end + 1 for end in ends[:-1])]
            texts = segment_texts(self.tokenizer, ids, ends)
            found.append([Segment(*one) for one in zip(texts, starts, ends, strict=True)])
        return found


class UserFunction:
    """A user's function, called with what its signature asks for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.call = loaded(name)
        self.wanted = self._wanted()
        self.law: Law | None = getattr(self.call, "conserves", None)
        if self.law is not None and self.law not in LAWS:
            raise DenserlError(
                f"the reward {name} says that it conserves {self.law!r}",
                hint=f"use one of {', '.join(map(repr, LAWS))}",
            )

    def __call__(self, responses: Responses) -> list[Value]:
        """What the function returns for each response, as plain numbers."""
        given = responses.arguments(self.wanted)
        try:
            answer = self.call(**given)
        except DenserlError:
            raise
        except (Exception, SystemExit) as error:
            raise failed(self.name, error) from error
        count = len(responses.rows)
        answer = self._rows(answer, responses) if hasattr(answer, "tolist") else answer
        if not isinstance(answer, list | tuple) or len(answer) != count:
            what = f"{len(answer)} values" if isinstance(answer, list | tuple) else _shown(answer)
            raise DenserlError(
                f"the reward {self.name} returned {what} for {count} responses",
                hint="return a list with one entry for each response, in their order",
            )
        origins = [f"{self.name} for {prompt.origin}" for prompt in responses.prompts]
        return [_value(one, where) for one, where in zip(answer, origins, strict=True)]

    def _rows(self, answer: Any, responses: Responses) -> Any:
        """A tensor of numbers for responses, (R,), segments, (R, K), or tokens, (R, T), as lists.

        Raises DenserlError, which names the first row, for another shape.
        """
        rows, rollout = list(responses.rows), responses.rollout
        if tuple(answer.shape) == (len(rows),):
            return answer.tolist()
        for positions in (rollout.response_mask, rollout.ends):
            counts = positions[rows].sum(1).tolist()
            whole = positions.shape[1] if positions is rollout.response_mask else max(counts)
            if tuple(answer.shape) == (len(rows), whole):
                return [row[:n] for row, n in zip(answer.tolist(), counts, strict=True)]
        tokens, segments = (p[rows].sum(1) for p in (rollout.response_mask, rollout.ends))
        raise DenserlError(
            f"the reward {self.name} returned a tensor of shape {tuple(answer.shape)} for "
            f"{len(rows)} responses; row 0, for {responses.prompts[0].origin}, has "
            f"{segments[0]} segments and {tokens[0]} tokens",
            hint=f"return ({len(rows)},), ({len(rows)}, {segments.max()}) for segments or "
            f"({len(rows)}, {rollout.response_mask.shape[1]}) for tokens, or a list of rows",
        )

    def _wanted(self) -> list[str]:
        known, wanted = (*Responses.NAMES, *NAMES), []
        try:
            parameters = inspect.signature(self.call).parameters
        except (ValueError, TypeError) as error:
            raise DenserlError(
                f"the reward {self.name} does not say what it takes: {error}",
                hint="wrap it in a function of your own",
            ) from error
        for name, parameter in parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                return list(Responses.NAMES)
            if name in known and parameter.kind is not parameter.POSITIONAL_ONLY:
                wanted.append(name)
            elif parameter.default is parameter.empty and parameter.kind is not (
                parameter.VAR_POSITIONAL
            ):
                raise DenserlError(
                    f"the reward {self.name} asks for {name}",
                    hint=f"it can have, by keyword, {', '.join(known)}",
                )
        return wanted


def loaded(name: str) -> Callable[..., Any]:
    """Import a reward function. Raises DenserlError when that fails."""
    see_current_folder()
    entry, found = installed(name), module_and_name(name)
    try:
        if not name.startswith(PREFIX) and entry is not None:
            function = entry.load()
        else:
            assert found is not None, "checked when the recipe is loaded"
            function = getattr(importlib.import_module(found[0]), found[1], None)
    except DenserlError:
        raise
    except (Exception, SystemExit) as error:
        raise failed(name, error) from error
    if not callable(function):
        reason = why_not(name) or "it is not a function"
        raise DenserlError(f"ppo.rewards {name}: {reason}", hint="name a function")
    return function


def failed(name: str, error: BaseException) -> DenserlError:
    """An error in a reward function as one message, with the lines of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, importlib.__file__)
    theirs = [f for f in frames if f.filename not in ours and not f.filename.startswith("<frozen")]
    lines = [*traceback.format_list(theirs), *traceback.format_exception_only(error)]
    return DenserlError(
        f"the reward {name} failed:\n{''.join(lines).rstrip()}", hint="correct the function"
    )


def placed(
    values: Sequence[Value],
    rollout: Rollout,
    settings: RewardSettings,
    where: Sequence[str],
    *,
    keep_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """Assign what a function returned to tokens.

    One number a response goes to the last token, as in bandit; one number a segment is spread over
    the segment's tokens like a reward model's (`ppo.segment_total`, `ppo.interpolation`); one
    number a token stays at its token.

    Args:
        values: What the function returned for each of the R responses.
        rollout: The responses.
        settings: How rewards of segments are spread.
        where: The function and the prompt of each response, for errors.
        keep_sum: The rewards of segments keep their sum, whatever `ppo.segment_total` is.

    Returns:
        The reward of each token, (R, T), and the total of each response, (R,).

    Raises:
        DenserlError: The values are of different kinds, or their number fits neither segments nor
            tokens; it names the first such response.
    """
    mask, ends = rollout.response_mask, rollout.ends
    if all(isinstance(value, float) for value in values):
        last = mask.cumsum(1).argmax(1)  # argmax returns the first of equal maxima
        given = torch.zeros(mask.shape, device=mask.device)
        given[torch.arange(len(mask)), last] = torch.tensor(values, device=mask.device)
        return given, given.sum(1)
    lists = [[value] if isinstance(value, float) else value for value in values]
    for kind, positions in (("segment", ends), ("token", mask)):
        counts = positions.sum(1).tolist()
        if all(
            isinstance(value, list) and len(value) == n
            for value, n in zip(values, counts, strict=True)
        ):
            numbers = torch.tensor(list(chain.from_iterable(lists)), device=mask.device)
            given = torch.zeros(mask.shape, device=mask.device).masked_scatter(positions, numbers)
            if kind == "token":
                return given, given.sum(1)
            return settings.spread(given, ends, mask, keep_sum=keep_sum)
    raise _misfit(values, ends.sum(1).tolist(), mask.sum(1).tolist(), where)


def _misfit(
    values: Sequence[Value], segments: Sequence[int], tokens: Sequence[int], where: Sequence[str]
) -> DenserlError:
    """The error for the first response whose value is of another kind than those before it."""
    kinds = [
        {"number"} if isinstance(value, float)
        else {k for k, n in (("segment", s), ("token", t)) if len(value) == n}
        for value, s, t in zip(values, segments, tokens, strict=True)
    ]  # fmt: skip
    common = {"number", "segment", "token"}
    row = next(i for i, kind in enumerate(kinds) if not common.intersection(*kinds[: i + 1]))
    value = values[row]
    found = "one number" if isinstance(value, float) else f"{len(value)} numbers"
    return DenserlError(
        f"the reward {where[row]} is {found}, the response has {segments[row]} segments and "
        f"{tokens[row]} tokens",
        hint="return one number for every response, or one for each segment of every response, or "
        "one for each token",
    )


def _value(value: Any, where: str) -> Value:
    """A reward as plain numbers. Raises DenserlError unless all are finite."""
    shape = tuple(getattr(value, "shape", ()))
    value = value.tolist() if hasattr(value, "tolist") else value
    if len(shape) > 1:
        raise DenserlError(
            f"the reward {where} has shape {shape}",
            hint="return one number, or one dimension with a number for each segment or token",
        )
    several = isinstance(value, list | tuple)
    for number in value if several else [value]:
        if not isinstance(number, int | float) or not abs(number) < _LARGEST:  # NaN is not below it
            raise DenserlError(
                f"the reward {where} is {_shown(number)}, not a finite number",
                hint="return a number for the response, or a list of numbers for its segments or "
                "its tokens",
            )
    return [float(number) for number in value] if several else float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
