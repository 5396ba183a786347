"""One folder that transformers 4 and transformers 5 read as the same model.

transformers 5 writes RoPE's settings as `rope_parameters` and names tokenizer classes that release
4 does not have. Release 4 takes its defaults for settings that it does not find, without a word: a
Llama 3.1 then computes something else. So an export has the settings under both names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSIONS = ("4.57.6", "5.23.0")
"""The releases of transformers that exports of the architectures in `TRIED` were read with."""
TRIED = frozenset(
    ("gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2",
     "olmo3", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm")
)  # fmt: skip
"""Architectures (`model_type`) whose exports gave the same logits in all of `VERSIONS`."""

_RENAMED = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""Names in transformers 4 that differ from those of other architectures."""
_LOCAL_THETA = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
"""Name in transformers 4 of the theta of layers with sliding attention that have their own."""


def write_config(folder: Path, **more: Any) -> bool:
    """Add what transformers 4 reads to an exported model's config.json.

    Args:
        folder: The exported model.
        more: Further fields to set, such as `problem_type`.

    Returns:
        Whether transformers 4 can express the model's RoPE. If not, or if transformers 5 would no
        longer read the same configuration, nothing is added but `more`.
    """
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **more}
    _write_json(file, config)
    rope = rope_of_transformers_4(config)
    if rope is None:
        return False
    expected = _configuration(folder)
    dtype = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    _write_json(file, {**config, **rope, **dtype})
    found = _configuration(folder)
    if all(found.get(name) == value for name, value in expected.items()):
        return True
    _write_json(file, config)
    return False


def rope_of_transformers_4(config: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of config.json by which transformers 4 sets RoPE up.

    Args:
        config: A config.json as transformers 5 writes it.

    Returns:
        The fields, none of them without RoPE; None where transformers 4 has no place for the
        settings: kinds of layers that differ in more than it allows.
    """
    rope, kind = config.get("rope_parameters"), config["model_type"]
    if not rope:
        return {}
    if "rope_type" in rope:
        return _flat(rope, kind)
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if not full or not sliding or len(rope) > 2 or sliding["rope_type"] != "default":
        return None
    fields = _flat(full, kind)
    if kind in _LOCAL_THETA:
        fields[_LOCAL_THETA[kind]] = sliding["rope_theta"]
    elif sliding["rope_theta"] != full["rope_theta"]:
        return None
    return fields


def _flat(rope: dict[str, Any], kind: str) -> dict[str, Any]:
    """The fields for layers that all have one RoPE."""
    scaling, renamed = dict(rope), _RENAMED.get(kind, {})
    fields = {
        renamed.get(name, name): scaling.pop(name)
        for name in ("rope_theta", "partial_rotary_factor")
        if name in scaling
    }
    if scaling["rope_type"] == "default":
        return fields
    if kind == "phi3":  # its configuration demands these three fields and no other
        factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
        scaling = {"type": scaling["rope_type"], **factors}
    return {**fields, "rope_scaling": scaling}


def write_tokenizer_config(folder: Path, **more: Any) -> None:
    """Make an exported tokenizer the one of its tokenizer.json in both releases.

    A class of one architecture would do more in transformers 4 than tokenizer.json says, such as
    putting a start token before every text.

    Args:
        folder: The exported model; one without a tokenizer.json stays as it is.
        more: Further fields to set; None removes one.
    """
    file = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    special = config.get("extra_special_tokens")
    if isinstance(special, list):  # in transformers 4 a mapping of names to tokens
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # how this machine loaded it
        config.pop(name, None)
    # otherwise transformers 4 makes token types, which causal models do not take
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", **more}
    _write_json(file, {name: value for name, value in config.items() if value is not None})


def _configuration(folder: Path) -> dict[str, Any]:
    """What this release of transformers reads from a config.json."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    rope = config.get("rope_parameters")
    if rope:
        rope.pop("type", None)  # the older name of rope_type, which stays beside it
    return config


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
