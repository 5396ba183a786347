"""An exported folder is plain transformers' and says what it is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation import score_responses
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.stages.export import export
from denserl_cli.core.stages.run import run_stage
from tests import tiny

IDS = torch.tensor([[3, 9, 10, 11, 4, 20]])


@pytest.fixture(scope="module")
def _finished(_scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(_scored, tmp_path_factory.mktemp("finished") / "run"))
    run_stage("train-ppo", tiny.recipe(), folder, "start", Observer())
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_finished, tmp_path / "finished"))


def write(folder: Path, part: str, target: Path, *settings: str, replace: bool = False) -> None:
    recipe = tiny.recipe(*settings)
    export(part, recipe, RunFolder(folder, recipe), target, replace=replace)


@pytest.mark.parametrize("part", ["policy", "policy-best"])
def test_a_policy_loads_without_denserl(part: str, finished: Path, tmp_path: Path):
    write(finished, part, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(finished / part.replace("-", "_"))
    assert torch.equal(exported(IDS).logits, trained(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    assert exported.generation_config.eos_token_id == [tokenizer.eos_token_id]


def test_a_reward_model_loads_without_denserl_and_keeps_its_records(finished: Path, tmp_path: Path):
    write(finished, "reward-model", tmp_path / "out")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    trained = AutoModelForSequenceClassification.from_pretrained(finished / "reward_model")
    assert torch.equal(exported(IDS).logits, trained(IDS).logits)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"denserl.json", "normalizer.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize(
    ("part", "figure"), [("policy", "eval_true_reward"), ("reward-model", "eval_accuracy")]
)
def test_the_card_has_the_recipe_and_the_figures(
    part: str, figure: str, finished: Path, tmp_path: Path
):
    write(finished, part, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers" and part in header["tags"]
    assert re.search(rf"^\| {figure} \| .*\d", card, re.MULTILINE)
    (recipe_text,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "again.yaml").write_text(recipe_text)
    assert load_recipe(str(tmp_path / "again.yaml")).ppo == tiny.recipe().ppo


def test_the_code_of_the_card_runs(finished: Path, tmp_path: Path):
    for part, made in (("policy", "output"), ("reward-model", "score")):
        write(finished, part, tmp_path / part)
        card = (tmp_path / part / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        places = {"PATH": tmp_path / part, "REFERENCE": finished / "sandbox" / "model"}
        for name, place in places.items():
            code = code.replace(name, str(place))
        names: dict[str, Any] = {}
        exec(code, names)
        assert names[made] is not None


def test_programs_are_told_that_a_reward_model_is_a_regression(finished: Path, tmp_path: Path):
    write(finished, "reward-model", tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    write(finished, "policy", tmp_path / "policy")
    assert "problem_type" not in json.loads((tmp_path / "policy" / "config.json").read_text())


@pytest.mark.parametrize("part", ["policy", "reward-model"])
def test_what_transformers_4_reads_stands_in_the_folder(part: str, finished: Path, tmp_path: Path):
    write(finished, part, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|user|>" in tokenizer["additional_special_tokens"]
    assert not {"is_local", "extra_special_tokens"} & tokenizer.keys()


def test_a_bandit_reward_model_as_classifier_scores_as_denserl_does(tmp_path: Path):
    recipe = tiny.recipe("segmentation.granularity=bandit", "segmentation.cutoff=null")
    run = tmp_path / "run"
    run_stage("train-rm", recipe, run, "start", Observer())
    target = tmp_path / "out"
    folder = RunFolder(run, recipe)
    export("reward-model", recipe, folder, target, replace=False, as_classifier=True)
    lines = (run / "sandbox" / "preferences.jsonl").read_text().splitlines()[:4]
    talks = [json.loads(line)[side] for line in lines for side in ("chosen", "rejected")]
    (code,) = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("PATH", str(target)), names)
    classifier = names["classifier"]
    texts = [classifier.tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    found = [one["score"] for one in classifier(texts, batch_size=3)]
    assert found == pytest.approx(
        [one.score for one in score_responses(recipe, run, talks)], abs=1e-5
    )
    published = [f"published.reward_model={target}", "published.granularity=bandit"]
    settings = [*tiny.SETTINGS, "segmentation.cutoff=null", *published]
    as_published = load_recipe("sandbox-bandit", settings)
    again = score_responses(as_published, tmp_path / "another", talks)
    assert [one.score for one in again] == pytest.approx(found, abs=1e-5)


def test_what_is_no_classifier_is_refused_before_anything_is_written(
    finished: Path, tmp_path: Path
):
    recipe = tiny.recipe()
    run = RunFolder(finished, recipe)
    for part, match in (
        ("reward-model", "a segment reward model is no classifier"),
        ("policy", "only a reward model can be a classifier"),
    ):
        with pytest.raises(DenserlError, match=match):
            export(part, recipe, run, tmp_path / "out", replace=False, as_classifier=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused_without_replace(finished: Path, tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    write(finished, "reward-model", target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(DenserlError, match="is not empty") as caught:
        write(finished, "policy", target)
    assert "--fresh" in caught.value.hint
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    write(finished, "policy", target, replace=True)
    assert not (target / "denserl.json").exists()
    AutoModelForCausalLM.from_pretrained(target)


def test_only_an_export_is_ever_replaced(finished: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("the work of years")
    papers = (tmp_path / "thesis" / "chapter.txt", tmp_path / "thesis")
    for target in (*papers, finished, finished / "policy", finished / "reward_model"):
        with pytest.raises(DenserlError, match="something else than an earlier export"):
            write(finished, "policy", target, replace=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "the work of years"
    assert (finished / "run.json").exists()


def test_what_is_not_trained_cannot_be_exported(scored: Path, tmp_path: Path):
    with pytest.raises(DenserlError, match="has no finished policy") as caught:
        write(scored, "policy", tmp_path / "out")
    assert "denserl train-ppo" in caught.value.hint
    with pytest.raises(DenserlError, match="has no finished reward model") as caught:
        write(tmp_path / "nothing", "reward-model", tmp_path / "out")
    assert "denserl train-rm" in caught.value.hint
    assert not (tmp_path / "out").exists() and not (tmp_path / "nothing").exists()


def test_an_interrupted_stage_cannot_be_exported(finished: Path, tmp_path: Path):
    book = json.loads((finished / "run.json").read_text())
    book["stages"]["train-ppo"]["status"] = "interrupted"
    (finished / "run.json").write_text(json.dumps(book))
    with pytest.raises(DenserlError, match="has no finished policy best"):
        write(finished, "policy-best", tmp_path / "out")


def test_a_recipe_that_did_not_make_the_model_is_refused(finished: Path, tmp_path: Path):
    with pytest.raises(DenserlError, match=r"ppo\.lam was 0\.95, is 0\.5"):
        write(finished, "policy", tmp_path / "out", "ppo.lam=0.5")
    write(finished, "reward-model", tmp_path / "out", "ppo.lam=0.5")  # reads no ppo settings
