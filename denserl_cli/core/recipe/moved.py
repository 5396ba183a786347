"""Fields that earlier versions had: the problem says how the same is written now."""

from __future__ import annotations

import json
from typing import Any

from denserl_cli.core.recipe.document import Node, plain

MOVED = {
    "ppo.rollout_batch_size": "ppo.rollout.batch_size",
    "ppo.rollout_micro_batch_size": "ppo.rollout.micro_batch_size",
    "ppo.samples_per_prompt": "ppo.rollout.samples_per_prompt",
    "ppo.max_new_tokens": "ppo.rollout.max_new_tokens",
    "ppo.temperature": "ppo.rollout.temperature",
    "ppo.top_p": "ppo.rollout.top_p",
}
"""Fields of earlier releases, and where they are now."""

_REWARDS = ("reward", "reward_model_weight")


def moved(block: str, node: Node, name: str) -> tuple[str, str] | None:
    """The dotted key that took over an unknown one, and its value as it is written now.

    Args:
        block: Dotted name of the block that the unknown key is in.
        node: That block.
        name: The unknown key.

    Returns:
        None where the key was never one.
    """
    if block == "ppo" and name in _REWARDS:
        return "ppo.rewards", _rewards(
            *(plain(node.value.get(k, Node(None, ""))) for k in _REWARDS)
        )
    to = MOVED.get(f"{block}.{name}")
    return None if to is None else (to, _flow(plain(node.value[name])))


def _rewards(functions: Any, weight: Any) -> str:
    """The list of sources that does what `reward` and `reward_model_weight` did."""
    functions = functions or []
    sources = [functions] if isinstance(functions, str | dict) else list(functions)
    sources = [
        {"source" if key == "function" else key: value for key, value in one.items()}
        if isinstance(one, dict)
        else one
        for one in sources
    ]
    if weight is None:
        weight = 0 if sources else 1
    if weight:
        sources.insert(0, "values" if weight == 1 else {"source": "values", "weight": weight})
    return _flow(sources)


def _flow(value: Any) -> str:
    """A list or mapping of plain values on one line of YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{key}: {_flow(one)}" for key, one in value.items())
        return f"{{{pairs}}}"
    return value if isinstance(value, str) else json.dumps(value)
