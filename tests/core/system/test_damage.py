"""Every file of a saved model, spoilt in every way, is named."""

import json
from pathlib import Path

import pytest
import torch

from denserl_cli.core.chat.loading import load_tokenizer
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import load_causal_lm
from denserl_cli.core.models.scalar_head import load_scalar_model
from denserl_cli.core.recipe.schema import ModelConfig
from denserl_cli.core.system.damage import damage
from denserl_cli.core.system.hub import readable_errors
from tests import tiny
from tests.core.fake_tokenizers import byte_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.causal_lm().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert damage(tmp_path, tokenizer=True) is None
    assert damage(tmp_path, tokenizer=False) is None
    return tmp_path


def spoil(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "absent":
        file.unlink()
    else:
        kinds = {"empty": b"", "torn": data[: len(data) // 2], "garbage": bytes(range(256))}
        file.write_bytes(kinds.get(how, b"[]"))


@pytest.mark.parametrize("how", ["absent", "empty", "torn", "garbage", "list"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_starting_model(model: Path, name: str, how: str):
    spoil(model / name, how)
    with pytest.raises(DenserlError) as caught:
        load_causal_lm(ModelConfig(str(model)), trained=False)
    assert caught.value.message.startswith(f"cannot load the starting model {model}: ")
    verb = "there is no" if how == "absent" else "is damaged"
    assert name in caught.value.message and verb in caught.value.message
    assert "download the folder again" in caught.value.hint
    assert caught.value.hint.endswith("--set model.path=FOLDER")


@pytest.mark.parametrize("how", ["absent", "empty", "torn", "garbage", "list"])
def test_a_tokenizer(model: Path, how: str):
    spoil(model / "tokenizer.json", how)
    with pytest.raises(DenserlError, match=f"cannot load the tokenizer {model}: ") as caught:
        load_tokenizer(ModelConfig("a/b", tokenizer=str(model)))
    assert "tokenizer.json" in caught.value.message
    assert caught.value.hint.endswith("--set model.tokenizer=FOLDER")


def test_a_folder_without_tokenizer_names_the_field_for_another(model: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(DenserlError, match=r"there is no tokenizer\.json") as caught:
        load_tokenizer(ModelConfig(str(model)))
    assert "--set model.tokenizer=FOLDER" in caught.value.hint


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 123\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_no_file(model: Path, name: str):
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    (model / name).write_text(POINTER)
    with pytest.raises(DenserlError, match="git-lfs pointer") as caught:
        load_causal_lm(ModelConfig(str(model)), trained=False)
    assert name in caught.value.message and "git lfs pull" in caught.value.message


@pytest.mark.parametrize("how", ["empty", "torn"])
def test_weights_of_torch_save(model: Path, how: str):
    (model / "model.safetensors").unlink()
    torch.save(tiny.causal_lm().state_dict(), model / "pytorch_model.bin")
    load_causal_lm(ModelConfig(str(model)), trained=False)
    spoil(model / "pytorch_model.bin", how)
    with pytest.raises(DenserlError, match=r"pytorch_model\.bin is damaged"):
        load_causal_lm(ModelConfig(str(model)), trained=False)


def test_parts_without_their_index(model: Path):
    (model / "model.safetensors").unlink()
    tiny.causal_lm().save_pretrained(model, max_shard_size="4KB")
    index = model / "model.safetensors.index.json"
    for text, said in (
        ("{}", "it names no weights"),
        (None, "there is no model.safetensors.index"),
    ):
        index.write_text(text) if text else index.unlink()
        with pytest.raises(DenserlError, match=said):
            load_causal_lm(ModelConfig(str(model)), trained=False)


def configure(model: Path, **settings: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size": 30}, "embed_tokens"),
        ({"num_hidden_layers": 3}, r"lacks weights .*layers\.2"),
        ({"num_hidden_layers": 1}, r"not part of the llama model .*layers\.1"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"model_type": "unheard-of"}, "unheard-of"),
    ],
)
def test_a_configuration_of_another_model(model: Path, settings: dict, said: str):
    configure(model, **settings)
    for load in (
        lambda: load_causal_lm(ModelConfig(str(model)), trained=False),
        lambda: load_scalar_model(ModelConfig(str(model)), fresh_head=True, trained=False),
    ):
        with pytest.raises(DenserlError, match=said):
            load()


@pytest.mark.parametrize("place", ["file", "folder", "beside a configuration", "hub"])
def test_packed_weights_of_llama_cpp(model: Path, place: str):
    file = model / "model-Q4_K_M.gguf"
    (model / "model.safetensors").unlink()
    file.write_bytes(b"GGUF" + bytes(20))
    if place == "folder":
        (model / "config.json").unlink()
    path = {"file": str(file), "hub": "someone/model-GGUF"}.get(place, str(model))
    with pytest.raises(DenserlError, match="4 bits each") as caught:
        load_causal_lm(ModelConfig(path), trained=False)
    assert "\n" not in caught.value.message + caught.value.hint
    assert "gguf_file=" in caught.value.hint and "packed from" in caught.value.hint
    assert place == "hub" or file.name in caught.value.hint


def test_adapters_are_no_whole_model(model: Path):
    (model / "config.json").unlink()
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(DenserlError, match="adapters, not a whole model") as caught:
        load_causal_lm(ModelConfig(str(model)), trained=False)
    assert "denserl export" in caught.value.hint


def test_a_run_s_own_folder_is_made_again(model: Path):
    spoil(model / "model.safetensors", "torn")
    with (
        pytest.raises(DenserlError, match=r"model\.safetensors is damaged") as caught,
        readable_errors(str(model), "reward model", option=""),
    ):
        raise OSError("something")
    assert caught.value.hint == "train it again, with --fresh"


def test_a_part_that_the_index_names_and_that_is_absent(model: Path):
    index = '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    (model / "model.safetensors.index.json").write_text(index)
    found = damage(model, tokenizer=False)
    assert found == "there is no model-2.safetensors, which model.safetensors.index.json names"


def test_a_bug_beside_whole_files_keeps_its_traceback(model: Path):
    with pytest.raises(AttributeError), readable_errors(str(model), "model"):
        raise AttributeError("a bug")
