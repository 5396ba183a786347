"""Configurations that no model has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.architecture import read_config
from denserl_cli.core.planning.model_shape import configured_shape


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**12),
        ("num_attention_heads", 0),
        ("vocab_size", 0),
        ("hidden_size", -64),
        ("num_attention_heads", "four"),
    ],
)
def test_absurd_sizes_are_refused_in_one_line(tmp_path: Path, name: str, size):
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: size}))
    for read in (read_config, configured_shape):
        with pytest.raises(DenserlError) as error:
            read(str(tmp_path))
        assert str(tmp_path) in str(error.value)
