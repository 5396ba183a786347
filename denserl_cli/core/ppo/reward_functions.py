"""Reward functions: Python functions of the user, instead of a reward model or beside one."""

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
from denserl_cli.core.ppo.rewards import RewardSettings, spread_segments
from denserl_cli.core.recipe.functions import (
    PREFIX,
    installed,
    module_and_name,
    see_current_folder,
    short_name,
    why_not,
)
from denserl_cli.core.system.distributed import all_gather_object, rank, world_size

if TYPE_CHECKING:
    from denserl_cli.core.data.conversations import Prompt
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


class FunctionRewards(NamedTuple):
    """The rewards of all reward functions for the responses of a rollout.

    Attributes:
        tokens: (R, T), their weighted sum.
        totals: By the metric `reward_` + a function's name: its reward for each response before its
            weight, (R,).
    """

    tokens: Tensor
    totals: dict[str, Tensor]


def reward_settings(recipe: ResolvedRecipe) -> RewardSettings:
    """How a recipe computes the rewards of tokens."""
    ppo = recipe.ppo
    return RewardSettings(
        interpolation=ppo.interpolation,
        segment_total=ppo.segment_total,
        length_normalize=ppo.length_normalize,
        clip=ppo.reward_clip,
        learned_weight=ppo.reward_model_weight,
        missing_eos_penalty=ppo.missing_eos_penalty,
        max_response_tokens=ppo.max_response_tokens,
        overlong_penalty=ppo.overlong_penalty,
        last_token_only=recipe.segmentation.granularity == "bandit",
    )


class RewardFunctions:
    """The reward functions of a recipe."""

    def __init__(self, recipe: ResolvedRecipe, tokenizer: Any) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.functions = [(one.weight, UserFunction(one.function)) for one in recipe.ppo.reward]

    def __call__(self, prompts: Sequence[Prompt], rollout: Rollout) -> FunctionRewards | None:
        """Call each function on all responses of a rollout; None without functions.

        Each process calls them once, for its share of the rows.

        Args:
            prompts: The prompt of each response.
            rollout: With R responses.

        Returns:
            The rewards of all functions, the same in every process.

        Raises:
            DenserlError: A function fails, or returns something that is not a reward.
        """
        if not self.functions:
            return None
        tokens = torch.zeros(rollout.response_mask.shape, device=rollout.response_mask.device)
        totals = {}
        mine = Responses(self.recipe, self.tokenizer, prompts, rollout)
        for weight, function in self.functions:
            theirs, size = all_gather_object(function(mine) if mine.rows else []), world_size()
            values = [theirs[row % size][row // size] for row in range(len(prompts))]
            where = [f"{function.name} for {prompt.origin}" for prompt in prompts]
            given, total = placed(values, rollout, self.recipe, where)
            tokens += weight * given
            totals[f"reward_{short_name(function.name)}"] = total
        return FunctionRewards(tokens, totals)


class Responses:
    """The responses of this process's rows, in each form that a function can ask for."""

    NAMES = (
        *("prompts", "messages", "responses", "token_ids", "segments", "terminated", "rows"),
        "recipe",
    )

    def __init__(
        self, recipe: ResolvedRecipe, tokenizer: Any, prompts: Sequence[Prompt], rollout: Rollout
    ) -> None:
        self.recipe, self.tokenizer, self.rollout = recipe, tokenizer, rollout
        self.rows = range(rank(), len(prompts), world_size())
        self.prompts = [prompts[row] for row in self.rows]
        self.ids = [rollout.responses[row].tolist() for row in self.rows]

    def arguments(self, names: Sequence[str]) -> dict[str, Any]:
        """The arguments of these names, copied, because a function may change them."""
        return {name: getattr(self, f"_{name}")() for name in names}

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

    def __call__(self, responses: Responses) -> list[Value]:
        """What the function returns for each response, as plain numbers."""
        given = responses.arguments(self.wanted)
        try:
            answer = self.call(**given)
        except DenserlError:
            raise
        except (Exception, SystemExit) as error:
            raise failed(self.name, error) from error
        answer = answer.tolist() if hasattr(answer, "tolist") else answer
        count = len(responses.rows)
        if not isinstance(answer, list | tuple) or len(answer) != count:
            what = f"{len(answer)} values" if isinstance(answer, list | tuple) else _shown(answer)
            raise DenserlError(
                f"the reward {self.name} returned {what} for {count} responses",
                hint="return a list with one entry for each response, in their order",
            )
        origins = [f"{self.name} for {prompt.origin}" for prompt in responses.prompts]
        return [_value(one, where) for one, where in zip(answer, origins, strict=True)]

    def _wanted(self) -> list[str]:
        known, wanted = Responses.NAMES, []
        try:
            parameters = inspect.signature(self.call).parameters
        except (ValueError, TypeError) as error:
            raise DenserlError(
                f"the reward {self.name} does not say what it takes: {error}",
                hint="wrap it in a function of your own",
            ) from error
        for name, parameter in parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                return list(known)
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
        raise DenserlError(f"ppo.reward {name}: {reason}", hint="name a function")
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
    values: Sequence[Value], rollout: Rollout, recipe: ResolvedRecipe, where: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Assign what a function returned to tokens.

    One number a response goes to the last token, as in bandit; one number a segment is spread over
    the segment's tokens like a reward model's (`ppo.segment_total`, `ppo.interpolation`); one
    number a token stays at its token.

    Args:
        values: What the function returned for each of the R responses.
        rollout: The responses.
        recipe: Says how rewards of segments are spread.
        where: The function and the prompt of each response, for errors.

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
            return (given, given.sum(1)) if kind == "token" else _spread(given, rollout, recipe)
    raise _misfit(values, ends.sum(1).tolist(), mask.sum(1).tolist(), where)


def _spread(values: Tensor, rollout: Rollout, recipe: ResolvedRecipe) -> tuple[Tensor, Tensor]:
    """Spread rewards, which stand at segment ends, over the tokens: (R, T), and their totals."""
    mask, total = rollout.response_mask, recipe.ppo.segment_total
    spread, at_ends = (
        spread_segments(values, rollout.ends, mask, interpolation=how, segment_total=total)
        for how in (recipe.ppo.interpolation, "end")
    )
    return spread, at_ends.sum(1)


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
    value = value.tolist() if hasattr(value, "tolist") else value
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
