"""transformers 4.57 and 5 read one export as the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from denserl_cli.core.exports.compatibility import (
    TRIED,
    VERSIONS,
    rope_of_transformers_4,
    write_config,
    write_tokenizer_config,
)
from denserl_cli.core.sandbox.language_model import build_tokenizer
from denserl_cli.core.sandbox.task import Task
from tests import SHARED, tiny
from tests.core.exports.conftest import Reader

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
PLAIN = {"rope_type": "default", "rope_theta": 20000.0}
HALF = {**PLAIN, "partial_rotary_factor": 0.5}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [2.0 + i / 5 for i in range(8)],
}
LAYERS = ["sliding_attention", "full_attention"]
LINEAR = {**PLAIN, "rope_type": "linear", "factor": 8.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "rope_parameters": PLAIN},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": LAYERS,
        "rope_parameters": {
            "full_attention": LINEAR,
            "sliding_attention": {**PLAIN, "rope_theta": 12345.0},
        },
    },
    "glm4": {"head_dim": 16, "rope_parameters": HALF},
    "gpt2": {},
    "gpt_neox": {"rope_parameters": HALF},
    "granite": {"rope_parameters": PLAIN},
    "llama": {"rope_parameters": LLAMA_3},
    "mistral": {"rope_parameters": PLAIN},
    "olmo2": {"rope_parameters": PLAIN},
    "olmo3": {
        "layer_types": LAYERS,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
    },
    "phi": {"rope_parameters": HALF},
    "phi3": {"original_max_position_embeddings": 64, "rope_parameters": LONG},
    "qwen2": {"rope_parameters": YARN},
    "qwen3": {"head_dim": 16, "rope_parameters": PLAIN, "tie_word_embeddings": True},
    "smollm3": {"rope_parameters": PLAIN},
    "stablelm": {"rope_parameters": HALF},
}
IDS = (torch.arange(300) * 7 % 61 + 3)[None]
READ_MODELS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
found = {"version": transformers.__version__}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = torch.load(folder + "/logits.pt")
    ids = (torch.arange(300) * 7 % 61 + 3)[None]
    found[folder] = (model(ids).logits - expected).abs().max().item()
print(json.dumps(found))
"""
READ_TOKENIZERS = """
import json, sys
from transformers import AutoTokenizer
texts = json.loads(sys.argv[1])
found = []
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": texts[0]}], tokenize=False)
    ids = [tokenizer(text).input_ids for text in [*texts, chat]]
    found.append([ids, sorted(tokenizer.all_special_ids), tokenizer.decode(ids[0])])
    assert "token_type_ids" not in tokenizer(texts[0]), folder
print(json.dumps(found))
"""
TEXTS = ["Hello,  world! It costs 12.50 <|end|>\n\nnew — ünïcode", " leading", "write calm words"]


def write_model(folder: Path, kind: str) -> torch.Tensor:
    """Save a model with random weights as transformers 5 does; returns its logits."""
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {}
    config = AutoConfig.for_model(**{**SIZES, **sizes, **SETTINGS[kind], "model_type": kind})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    logits = model(IDS).logits.detach()
    torch.save(logits, folder / "logits.pt")
    return logits


def rope(folder: Path) -> dict[str, Any]:
    """What transformers 5 reads of RoPE; `type` is an older name beside `rope_type`."""
    found = AutoConfig.from_pretrained(folder).to_dict().get("rope_parameters") or {}
    return {name: value for name, value in found.items() if name != "type"}


def test_every_architecture_that_the_card_calls_tried_is_tried_here():
    assert set(SETTINGS) == TRIED


def test_both_releases_compute_the_same(tmp_path: Path, transformers_4: Reader):
    for kind in SETTINGS:
        logits = write_model(tmp_path / kind, kind)
        before = rope(tmp_path / kind)
        assert write_config(tmp_path / kind), kind
        assert rope(tmp_path / kind) == before, kind
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind, attn_implementation="eager")
        assert torch.equal(again.eval()(IDS).logits, logits), kind
    write_model(tmp_path / "untouched", "llama")
    found = transformers_4(READ_MODELS, *sorted(tmp_path.iterdir()))
    assert found.pop("version") == VERSIONS[0]
    assert found.pop(str(tmp_path / "untouched")) > 1  # what release 4 makes of it without a word
    assert {Path(folder).name: gap for folder, gap in found.items() if gap > 1e-5} == {}


def test_the_fields_of_release_4():
    llama = rope_of_transformers_4({"model_type": "llama", "rope_parameters": LLAMA_3})
    scaling = {name: value for name, value in LLAMA_3.items() if name != "rope_theta"}
    assert llama == {"rope_theta": 500000.0, "rope_scaling": scaling}
    neox = rope_of_transformers_4({"model_type": "gpt_neox", "rope_parameters": HALF})
    assert neox == {"rotary_emb_base": 20000.0, "rotary_pct": 0.5}
    assert rope_of_transformers_4({"model_type": "gpt2"}) == {}


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": LINEAR, "sliding_attention": {**PLAIN, "rope_theta": 1.0}},
        {"full_attention": PLAIN, "sliding_attention": LINEAR},
        {"full_attention": PLAIN, "sliding_attention": PLAIN, "chunked_attention": PLAIN},
        {"full_attention": PLAIN, "sliding_attention": None},
    ],
)
def test_what_release_4_cannot_express_is_left_out(rope: dict[str, Any], tmp_path: Path):
    assert rope_of_transformers_4({"model_type": "olmo3", "rope_parameters": rope}) is None
    write_model(tmp_path, "olmo3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    assert not write_config(tmp_path, problem_type="regression")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {**config, "rope_parameters": rope, "problem_type": "regression"}


def test_both_releases_give_the_same_ids(tmp_path: Path, transformers_4: Reader):
    recipe = tiny.recipe()
    assert recipe.sandbox is not None
    build_tokenizer(Task(recipe.sandbox, recipe.seed)).save_pretrained(tmp_path / "sandbox")
    vocabulary = {t: i for i, t in enumerate(("<unk>", "<s>", "</s>", "▁", *"helo,wrd!Itcss"))}
    own = LlamaTokenizer(vocab=vocabulary, merges=[])  # release 4's class adds a start token
    own.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    own.save_pretrained(tmp_path / "llama-class")
    folders = [tmp_path / "sandbox", tmp_path / "llama-class"]
    for source in sorted(SHARED.glob("tokenizers/*/tokenizer.json")):  # real ones, where they are
        AutoTokenizer.from_pretrained(source.parent).save_pretrained(tmp_path / source.parent.name)
        folders.append(tmp_path / source.parent.name)
    expected = []
    for folder in folders:
        before = AutoTokenizer.from_pretrained(folder)
        write_tokenizer_config(folder)
        after = AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": TEXTS[0]}]
        texts = [*TEXTS, str(before.apply_chat_template(chat, tokenize=False))]
        ids = [before(text).input_ids for text in texts]
        assert [after(text).input_ids for text in texts] == ids
        assert after.apply_chat_template(chat, tokenize=False) == texts[-1]
        assert after.get_vocab() == before.get_vocab()
        assert after.extra_special_tokens == before.extra_special_tokens
        expected.append([ids, sorted(after.all_special_ids), after.decode(ids[0])])
    found = transformers_4(READ_TOKENIZERS, json.dumps(TEXTS), *folders)
    for folder, theirs, ours in zip(folders, found, expected, strict=True):
        assert theirs[0] == ours[0], folder.name
        assert set(theirs[1]) >= set(ours[1]), folder.name
        assert theirs[2] == ours[2], folder.name


def test_a_tokenizer_without_tokenizer_json_stays_as_it_is(tmp_path: Path):
    config = {"tokenizer_class": "ByT5Tokenizer", "extra_special_tokens": ["a"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    write_tokenizer_config(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == config
