"""Which reward model and normaliser a run scores with, and that the two pairs are never mixed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.scoring.loading import load_reward_model
from denserl_cli.core.scoring.resolve import load_normalizer, prepare, reward_record
from denserl_cli.core.stages.run import run_stage
from tests.core.conftest import MakeRecipe
from tests.fakes import RecordingObserver

COEFFICIENTS = "{w_mean: 0.1, w_std: 0.2, b_mean: 0.3, b_std: 0.4}"
PPO = (
    "data.eval_prompts=2",
    "ppo.iterations=1",
    "ppo.rollout.batch_size=2",
    "ppo.train_batch_size=2",
    "ppo.micro_batch_size=2",
    "ppo.rollout.max_new_tokens=4",
)


@pytest.fixture
def weights(trained: Path, tmp_path: Path) -> Path:
    """A published reward model: weights alone, as in a cache of the hub."""
    folder = Path(shutil.copytree(trained / "reward_model", tmp_path / "published"))
    (folder / "denserl.json").unlink()
    return folder


def published(folder: Path, cut: str = "granularity: segment, cutoff: 1.0", more: str = "") -> str:
    return f"published={{reward_model: {folder}, {cut}{more}}}"


def pair(folder: Path) -> str:
    return published(folder, more=f", normalizer: {COEFFICIENTS}")


def run_of(recipe: Recipe, path: Path) -> RunFolder:
    return RunFolder(path, recipe)


def opened(recipe: Recipe, path: Path, recorder: RecordingObserver | None = None) -> None:
    prepare(recipe, run_of(recipe, path), recorder or Observer(), reward_model=True)


def coefficients(path: Path) -> tuple[float, ...]:
    found = LocationNormalizer.load(path / "reward_model" / "normalizer.json")
    return found.w_mean, found.w_std, found.b_mean, found.b_std


def test_ppo_starts_from_a_published_pair(recipe: MakeRecipe, weights: Path, tmp_path: Path):
    folder, recorder = tmp_path / "run", RecordingObserver()
    asked = recipe(pair(weights), *PPO)
    run_stage("train-ppo", asked, folder, "start", recorder)
    assert (folder / "policy" / "config.json").exists()
    assert sorted(file.name for file in (folder / "reward_model").iterdir()) == [
        "denserl.json",
        "normalizer.json",
    ]
    record = json.loads((folder / "reward_model" / "denserl.json").read_text())
    assert (record["granularity"], record["cutoff"], record["terminator_id"]) == (
        "segment",
        1.0,
        5,
    )
    assert record["weights"] == str(weights) and record["reference"] == asked.model.path
    assert coefficients(folder) == (0.1, 0.2, 0.3, 0.4)
    told = [n for n in recorder.notices if "published reward model" in n]
    assert len(told) == 1 and str(weights) in told[0] and "and its published normaliser" in told[0]
    model = load_reward_model(
        reward_record(asked, run_of(asked, folder)), asked, run_of(asked, folder)
    ).model
    plain = AutoModelForSequenceClassification.from_pretrained(weights)
    assert torch.equal(model.score.weight, plain.score.weight)
    with pytest.raises(DenserlError, match=r"train-rm in .* would replace train-ppo"):
        run_stage("train-rm", asked, folder, "start", recorder)


def test_the_runs_own_reward_model_wins(recipe: MakeRecipe, weights: Path, run_with_model: Path):
    asked = recipe(pair(weights))
    run = run_of(asked, run_with_model)
    assert reward_record(asked, run).weights is None
    # its own model without a normaliser never gets the published one
    opened(asked, run_with_model)
    with pytest.raises(DenserlError, match="no normalizer") as caught:
        load_normalizer(asked, run)
    assert caught.value.hint and "fit-function" in caught.value.hint
    run_stage("fit-function", asked, run_with_model, "start", Observer())
    assert coefficients(run_with_model) != (0.1, 0.2, 0.3, 0.4)


def test_an_interrupted_training_is_not_replaced_by_the_published_model(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    asked = recipe(pair(weights))
    run_of(asked, tmp_path / "run").started("train-rm", "start", Observer())
    with pytest.raises(DenserlError, match="was interrupted") as caught:
        opened(asked, tmp_path / "run")
    assert caught.value.hint and "--resume" in caught.value.hint


def test_neither_own_nor_published(recipe: MakeRecipe, tmp_path: Path):
    with pytest.raises(DenserlError, match="no reward model") as caught:
        opened(recipe(), tmp_path / "run")
    assert caught.value.hint == "run denserl train-rm"


def test_a_fit_for_a_published_model_is_the_runs_own(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    folder, asked = tmp_path / "run", recipe(pair(weights))
    opened(asked, folder)
    run_stage("fit-function", asked, folder, "start", Observer())
    assert coefficients(folder) != (0.1, 0.2, 0.3, 0.4)
    assert load_normalizer(asked, run_of(asked, folder)) is not None
    opened(asked, folder)  # a fitted normaliser need not be the recipe's
    assert coefficients(folder) != (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("granularity: segment, cutoff: 2.5", ("segmentation.cutoff is 1.0", "with 2.5")),
        ("granularity: token", ("segmentation.granularity is segment", "with token")),
    ],
)
def test_a_recipe_that_contradicts_its_published_model(
    recipe: MakeRecipe, weights: Path, tmp_path: Path, cut: str, words: tuple[str, ...]
):
    with pytest.raises(DenserlError) as caught:
        opened(recipe(published(weights, cut)), tmp_path / "run")
    assert all(word in caught.value.message for word in (*words, str(weights)))
    assert not (tmp_path / "run").exists()


def test_another_published_pair_needs_another_folder(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    opened(recipe(pair(weights)), folder)
    other = Path(shutil.copytree(weights, tmp_path / "other"))
    changed = {
        pair(other): str(other),
        "published=null": "names none",
        published(weights, more=", revision: v2"): f"{weights} at v2",
        pair(weights).replace("0.4", "0.5"): "other coefficients",
    }
    for setting, words in changed.items():
        with pytest.raises(DenserlError) as caught:
            opened(recipe(setting), folder)
        assert words in caught.value.message
        assert caught.value.hint and "--out" in caught.value.hint
    opened(recipe(pair(weights)), folder)


def test_a_normaliser_of_other_segments_is_refused(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    folder, asked = tmp_path / "run", recipe(pair(weights))
    opened(asked, folder)
    file = folder / "reward_model" / "normalizer.json"
    content = json.loads(file.read_text())
    content["record"] |= {"cutoff": 2.0, "granularity": "token"}
    file.write_text(json.dumps(content))
    with pytest.raises(DenserlError, match=r"granularity token.*cutoff 2\.0 instead of 1\.0"):
        load_normalizer(asked, run_of(asked, folder))


def test_training_a_reward_model_moves_the_published_one_aside(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    folder, asked = tmp_path / "run", recipe(pair(weights), "reward_model.epochs=0.2")
    opened(asked, folder)
    run_stage("train-rm", asked, folder, "start", Observer())
    assert reward_record(asked, run_of(asked, folder)).weights is None
    assert not (folder / "reward_model" / "normalizer.json").exists()
    assert (folder / "replaced" / "reward_model.1" / "normalizer.json").exists()


def test_the_recipes_floor_holds_for_the_published_normaliser(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    asked = recipe(pair(weights), "normalizer.min_std=0.2")
    opened(asked, tmp_path / "run")
    found = load_normalizer(asked, run_of(asked, tmp_path / "run"))
    assert found is not None and found.min_std == 0.2


# a published folder that denserl made


def test_a_folder_of_denserl_brings_its_own_record_and_normaliser(
    recipe: MakeRecipe, run_with_model: Path, tmp_path: Path
):
    own = recipe()
    run_stage("fit-function", own, run_with_model, "start", Observer())
    made, folder = run_with_model / "reward_model", tmp_path / "run"
    asked = recipe(published(made))
    opened(asked, folder)
    assert coefficients(folder) == coefficients(run_with_model)
    assert load_normalizer(asked, run_of(asked, folder)) is not None
    given = recipe(pair(made))  # the recipe's coefficients go before the folder's
    opened(given, tmp_path / "given")
    assert coefficients(tmp_path / "given") == (0.1, 0.2, 0.3, 0.4)


def test_a_folder_of_denserl_knows_better_than_the_recipe(
    recipe: MakeRecipe, run_with_model: Path, tmp_path: Path
):
    made, run = run_with_model / "reward_model", tmp_path / "run"
    wrong = published(made, "granularity: segment, cutoff: 1.5")
    with pytest.raises(DenserlError, match=r"published\.cutoff is 1\.5, .*denserl\.json says 1\.0"):
        opened(recipe(wrong, "segmentation.cutoff=1.5"), run)
    with pytest.raises(DenserlError, match=r"reward_model\.aggregate is sum, .* with mean"):
        opened(recipe(published(made), "reward_model.aggregate=sum"), run)
    record = json.loads((made / "denserl.json").read_text())
    (made / "denserl.json").write_text(json.dumps({**record, "terminator_id": 3}))
    with pytest.raises(DenserlError, match=r"responses end with token 5, .* with 3"):
        opened(recipe(published(made)), run)
    (made / "denserl.json").write_text(json.dumps({**record, "weights": "some/where"}))
    with pytest.raises(DenserlError, match="only the name of another") as caught:
        opened(recipe(published(made)), run)
    assert caught.value.hint and "published.reward_model=some/where" in caught.value.hint
    (made / "denserl.json").write_text("{")
    with pytest.raises(DenserlError, match="damaged"):
        opened(recipe(published(made)), run)


# what cannot be used


def test_nothing_is_recorded_for_a_model_that_is_not_there(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = recipe(published(Path("somebody/reward-model")))
    with pytest.raises(DenserlError, match="out of reach") as caught:
        opened(asked, tmp_path / "run")
    assert caught.value.hint and "--set published.reward_model=FOLDER" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_published_model_without_head_is_no_random_reward(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    file = weights / "model.safetensors"
    left = {name: w for name, w in load_file(file).items() if not name.startswith("score")}
    save_file(left, file, metadata={"format": "pt"})
    with pytest.raises(DenserlError, match=r"lacks weights of the reward model.*score\.weight"):
        run_stage("train-ppo", recipe(pair(weights), *PPO), tmp_path / "run", "start", Observer())
    assert not (tmp_path / "run").exists()


def test_an_evaluation_does_not_record_a_model_without_head(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    file = weights / "model.safetensors"
    left = {name: w for name, w in load_file(file).items() if not name.startswith("score")}
    save_file(left, file, metadata={"format": "pt"})
    run = tmp_path / "run"
    with pytest.raises(DenserlError, match=r"lacks weights of the reward model: score\.weight"):
        opened(recipe(pair(weights)), run)
    assert not (run / "reward_model").exists()


def test_a_model_with_another_tokenizer_cannot_reward_segments(
    recipe: MakeRecipe, weights: Path, tmp_path: Path
):
    file = weights / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    with pytest.raises(DenserlError, match="has another tokenizer than") as caught:
        opened(recipe(pair(weights)), tmp_path / "run")
    assert caught.value.hint and "bandit" in caught.value.hint
