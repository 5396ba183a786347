"""Folders of trained models, written from weights that need not be in the model itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from denserl_cli.core.system.files import write_text


def save_model(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model as transformers does, or its adapters alone; config.json names the type.

    Args:
        model: Of transformers; its own weights are not read.
        weights: All of them by name, as an engine gives them.
        folder: Where to write.
    """
    model.save_pretrained(folder, state_dict=dict(weights))
    file = folder / "config.json"
    if not file.exists():  # adapters have none
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    # transformers writes the type of the model's own weights
    kinds = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
    config["dtype"] = str(kinds[0]).removeprefix("torch.")
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
