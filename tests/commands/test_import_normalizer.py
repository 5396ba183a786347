import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.scoring.resolve import load_normalizer
from denserl_cli.core.stages.import_normalizer import choose, read_entries, to_normalizer
from tests import tiny

FOUR = [0.5, 0.25, -1.0, 2.0]
AUTHORS = {
    "tiny": {"preference700k_60000": {"1.0": FOUR, "0": [1, 1, 1, 1], "1000": [9, 9, 3, 4]}},
    "other": {"preference700k_60000": {"2.0": [1, 2, 3, 4]}},
}


def written(content: object, name: str = "coefficients.json") -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def record(granularity: str, cutoff: float | None = None) -> RewardRecord:
    return RewardRecord(granularity, cutoff, "mean", "model", None, None, 1, {})


def denserl(*options: str):
    words = ["import-normalizer", "-r", "sandbox-segment", *tiny.words(), *options]
    return CliRunner().invoke(app, words)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_numbers_stand_in_the_order_of_the_method():
    file = written(AUTHORS)
    entry = choose(read_entries(file), [], record("segment", 1.0), file)
    made = to_normalizer(entry, file, "segment", None)
    assert (made.w_mean, made.w_std, made.b_mean, made.b_std) == (0.5, 0.25, -1.0, 2.0)
    assert made.min_std == 0.2
    assert to_normalizer(entry, file, "segment", 0.5).min_std == 0.5


def test_cutoffs_0_and_1000_are_token_and_bandit():
    file = written(AUTHORS)
    entries = read_entries(file)
    assert choose(entries, [], record("token"), file).value == [1, 1, 1, 1]
    bandit = to_normalizer(choose(entries, [], record("bandit"), file), file, "bandit", None)
    assert (bandit.w_mean, bandit.w_std, bandit.b_mean, bandit.b_std) == (0, 0, 3, 4)


def test_every_published_coefficient_is_found_in_the_authors_nesting(shared: Path):
    published = json.loads((shared / "parity" / "rewards_ppo.json").read_text())
    file = written(published["published_coefficients"])
    models = {
        "phi3": "phi3-instruct",
        "llama3.1": "meta_llama_3_1_instruct_8b",
        "llama3-sft": "rlhflow_llama_3_sft_8b_v2",
    }
    for backbone, model in models.items():
        for granularity in ("segment", "token"):
            recipe = load_recipe(f"{backbone}-{granularity}")
            wanted = RewardRecord.published(recipe)
            entry = choose(read_entries(file), [model], wanted, file)
            made = to_normalizer(entry, file, granularity, None)
            for name in ("w_mean", "w_std", "b_mean", "b_std"):
                assert getattr(made, name) == getattr(recipe.published.normalizer, name)
    with pytest.raises(DenserlError, match=r"several entries of .* are for token") as caught:
        choose(read_entries(file), [], record("token"), file)
    assert "\n  phi3-instruct.0" in caught.value.message
    assert caught.value.hint == "choose one: --key rlhflow_llama_3_sft_8b_v2.0"


def test_a_key_names_one_part_of_the_path_or_several():
    file = written({"m": {"a.b": {"2.0": FOUR}, "c": {"2.0": [1, 1, 1, 1]}}, "n": {"20": FOUR}})
    entries = read_entries(file)
    for keys in (["a.b"], ["m.a.b"], ["m", "a.b", "2.0"], ["a.b.2.0"]):
        assert choose(entries, keys, record("segment", 2.0), file).path == ("m", "a.b", "2.0")
    with pytest.raises(DenserlError, match="has no key '2'"):  # a part of a key is no key
        choose(entries, ["2"], record("segment", 2.0), file)
    with pytest.raises(DenserlError, match=r"no entry for segment with cutoff 2 under n") as caught:
        choose(entries, ["n"], record("segment", 2.0), file)
    assert caught.value.message.endswith("it has\n  n.20")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "is not JSON"),
        ("[1, 2, 3, 4]", "is not a mapping"),
        ("{}", "is not a mapping"),
        ({"m": {"d": {"2.0": FOUR}}}, "no entry for segment with cutoff 1"),
        ({"m": {"d": FOUR}}, "no entry for segment with cutoff 1"),
        ({"nan": FOUR}, "no entry for segment with cutoff 1"),
        ({"1.0": FOUR[:3]}, "must be a list of four numbers"),
        ({"1.0": [1, 2, 3, "4"]}, "must be a list of four numbers"),
        ({"1.0": [1, 2, 3, True]}, "must be a list of four numbers"),
        ({"1.0": None}, "must be a list of four numbers"),
        ('{"1.0": [1, 2, NaN, 4]}', "not finite"),
        ('{"1.0": [1, 2, 1e999, 4]}', "not finite"),
        ('{"1.0": [1, 2, 3, 1' + "0" * 400 + "]}", "not finite"),
        ({"1.0": [1, 2, 3, 0]}, "must be positive"),
        ({"1.0": [1, 2, 3, -4]}, "must be positive"),
    ],
)
def test_a_file_that_cannot_be_used_leaves_the_run_as_it_was(
    content: object, message: str, scored: Path
):
    before = {path: path.read_bytes() for path in scored.rglob("*") if path.is_file()}
    result = denserl("--out", str(scored), "--fresh", str(written(content)))
    assert isinstance(result.exception, DenserlError)
    assert message in result.exception.message
    assert {path: path.read_bytes() for path in scored.rglob("*") if path.is_file()} == before


def test_a_file_that_cannot_be_read(scored: Path):
    for name, content in (("latin", b"\xff"), ("folder", None), ("absent", None)):
        if content:
            Path(name).write_bytes(content)
        elif name == "folder":
            Path(name).mkdir()
        assert isinstance(denserl("--out", str(scored), name).exception, DenserlError)


def test_an_imported_normaliser_is_the_one_that_ppo_uses(scored: Path):
    result = denserl("--out", str(scored), str(written(AUTHORS)))
    assert "has a normaliser already" in str(result.exception)
    assert "--fresh" in result.exception.hint

    result = denserl("--out", str(scored), "--fresh", str(written(AUTHORS)))
    assert result.exit_code == 0, result.exception
    recipe = tiny.recipe()
    run = RunFolder(scored, recipe)
    assert load_normalizer(recipe, run).b_mean == -1.0
    assert run.summary("fit-function")["source"] == "tiny.preference700k_60000.1.0 of " + str(
        Path("coefficients.json")
    )
    assert (scored / "replaced" / "reward_model" / "normalizer.json.1").exists()


def test_a_policy_that_did_without_a_normaliser_stays(scored: Path):
    (scored / "reward_model" / "normalizer.json").unlink()
    book = scored / "run.json"
    stages = json.loads(book.read_text())["stages"]
    trained = {"train-rm": stages["train-rm"], "train-ppo": stages["fit-function"]}
    document = {**json.loads(book.read_text()), "stages": trained}
    book.write_text(json.dumps(document))
    result = denserl(str(written(AUTHORS)), "-o", str(scored))
    assert isinstance(result.exception, DenserlError)
    assert "would replace train-ppo" in result.exception.message
    assert json.loads(book.read_text()) == document
    assert denserl(str(written(AUTHORS)), "-o", str(scored), "--fresh").exit_code == 0


def test_only_a_location_normaliser_can_be_imported(scored: Path):
    file = str(written(AUTHORS))
    result = denserl("--out", str(scored), "--set", "normalizer.kind=last", "--fresh", file)
    assert "normalizer.kind is last; imported coefficients are location" in str(result.exception)


def test_without_a_reward_model_nothing_is_made():
    result = denserl("--out", "new/run", str(written(AUTHORS)))
    assert "no reward model" in str(result.exception)
    assert not Path("new").exists()


def test_a_published_reward_model_is_adopted_with_the_imported_normaliser(scored: Path):
    published = {
        "reward_model": str(scored / "reward_model"),
        "granularity": "segment",
        "cutoff": 1.0,
    }
    (scored / "reward_model" / "normalizer.json").unlink()
    (scored / "reward_model" / "denserl.json").unlink()
    file = str(written(AUTHORS))
    model = ["--set", "sandbox=null", "--set", f"model.path={scored / 'sandbox' / 'model'}"]
    block = [*model, "--set", f"published={json.dumps(published)}"]
    result = denserl("--out", "run", *block, file)
    assert result.exit_code == 0, result.exception
    assert json.loads(Path("run/reward_model/normalizer.json").read_text())["b_mean"] == -1.0
    assert json.loads(Path("run/reward_model/denserl.json").read_text())["weights"]

    published["normalizer"] = {"b_mean": 1.0, "b_std": 1.0}
    block = [*model, "--set", f"published={json.dumps(published)}"]
    result = denserl("--out", "second", *block, file)  # its own coefficients are not overridden
    assert "has a normaliser already" in str(result.exception)
    assert not Path("second").exists()
    shutil.rmtree("run")
    assert denserl("--out", "second", "--fresh", *block, file).exit_code == 0
