"""Every file of a saved model, spoilt in every way, is named."""

from pathlib import Path

import pytest

from denserl_cli.core.chat.loading import load_tokenizer
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import load_causal_lm
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
