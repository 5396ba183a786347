"""Settings that an earlier release recorded in a run, under the names that they have now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from denserl_cli.core.recipe import recipe_to_dict
from denserl_cli.core.recipe.defaults import resolved
from denserl_cli.core.recipe.moved import MOVED
from denserl_cli.core.recipe.schema import Recipe, RewardSource, SandboxConfig
from denserl_cli.core.runs.settings import flat


def as_named_now(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings by today's names; a field that came later has its default.

    So a run goes on, or is found finished, under a release that knows more fields.

    Args:
        recorded: A stage's settings by dotted name, as a run's record has them.
        now: Those of this start, whose names count.
    """
    found = {MOVED.get(key, key): value for key, value in recorded.items()}
    if "ppo.reward_model_weight" in found:
        weight, functions = found.pop("ppo.reward_model_weight"), found.pop("ppo.reward", None)
        sources = [RewardSource("values", weight=weight)] if weight else []
        sources += [RewardSource(one["function"], one["weight"]) for one in functions or ()]
        found["ppo.rewards"] = [asdict(source) for source in sources]
    blocks = {key.rpartition(".")[0] for key in found}
    plain = replace(resolved(Recipe(name="")), sandbox=SandboxConfig())
    later = {
        key: value
        for key, value in flat(recipe_to_dict(plain)).items()
        if key in now and key not in found and key.rpartition(".")[0] in blocks - {""}
    }
    return found | later
