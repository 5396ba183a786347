"""What a user can get wrong, through the command line: one message, exit code 2, nothing lost."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from denserl_cli.app import main
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.schema import SandboxConfig
from denserl_cli.core.sandbox import files as sandbox
from denserl_cli.core.sandbox.files import SandboxFiles

STAGES = ("train-rm", "fit-function", "train-ppo")
TASK = SandboxConfig(
    phrases=4, phrase_length=2, response_phrases=3, pairs=24, hidden_size=16, layers=1, fit_steps=5
)


class Outcome(NamedTuple):
    code: int
    output: str
    errors: str


@pytest.fixture
def denserl(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Runs a command line in this process, as the console script does."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["denserl", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(denserl, here: Path) -> Callable[..., str]:
    """Runs a command line that must fail as a user's mistake should; returns the message."""

    def run(*words: object) -> str:
        before = tree(here)
        code, output, errors = denserl(*words)
        assert code == 2, errors
        assert output == "" and "Traceback" not in errors
        assert sum(line.startswith("error:") for line in errors.splitlines()) == 1
        assert tree(here) == before
        return errors[errors.index("error:") :]

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def slots(tmp_path_factory: pytest.TempPathFactory) -> SandboxFiles:
    folder = tmp_path_factory.mktemp("bad") / "sandbox"
    return sandbox.make(TASK, folder, seed=1, observer=Observer())


@pytest.fixture
def quick_sandbox(slots: SandboxFiles, monkeypatch) -> None:
    """Copies the sandbox that is there instead of fitting another model."""

    def make(_: object, folder: Path, **__: object) -> SandboxFiles:
        shutil.copytree(slots.model.parent, folder)
        return SandboxFiles(*(folder / path.name for path in slots))

    monkeypatch.setattr(sandbox, "make", make)


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mine(here: Path, slots: SandboxFiles) -> Path:
    """A user's recipe on a user's model and data."""
    text = f"""\
extends: sandbox-segment
sandbox: null
segmentation: {{cutoff: 1.0}}
model: {{path: {slots.model}}}
data: {{preferences: {slots.preferences}, prompts: {slots.prompts}, eval_pairs: 2}}
reward_model: {{epochs: 1, batch_size: 8, micro_batch_size: 8}}
normalizer: {{pairs: 8}}
"""
    path = here / "mine.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(slots: SandboxFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `mine` whose reward model is trained."""
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.stages.run import run_stage

    words = [
        "name=mine", "sandbox=null", "segmentation.cutoff=1.0", "data.eval_pairs=2",
        f"model.path={slots.model}",
        f"data.preferences=[{slots.preferences}]", f"data.prompts=[{slots.prompts}]",
        "reward_model.epochs=1", "reward_model.batch_size=8", "reward_model.micro_batch_size=8",
        "normalizer.pairs=8",
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_stage("train-rm", load_recipe("sandbox-segment", words), folder, "start", Observer())
    return folder


# recipes


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_recipe(refused, stage: str):
    assert "did you mean sandbox-segment" in refused(stage, "-r", "sandbox-segmnt", "-o", "x")


BAD_RECIPES = {
    "syntax": ("model: [1, 2", "r.yaml:"),
    "tabs": ("model:\n\tpath: a", "r.yaml:2"),
    "duplicate": ("seed: 1\nseed: 2\n", "r.yaml:2"),
    "key": ("ppo: {kl_coeff: 1}", "did you mean ppo.kl_coef?"),
    "type": ("seed: many", "r.yaml:1"),
    "choice": ("segmentation: {granularity: words}", "granularity"),
    "object": ("seed: !!python/object/apply:os.getcwd []", "r.yaml:1"),
    "list": ("- 1\n- 2", "r.yaml"),
    "combination": ("segmentation: {granularity: token, cutoff: 1.0}", "token has no cutoff"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_bad_recipe(refused, here: Path, name: str):
    text, expected = BAD_RECIPES[name]
    (here / "r.yaml").write_text(text)
    assert expected in refused("train-rm", "-r", "r.yaml", "-o", "x")


def test_a_recipe_that_is_no_text(refused, here: Path):
    (here / "r.yaml").write_bytes(b"\xff\xfe\x00binary")
    assert "r.yaml" in refused("train-rm", "-r", "r.yaml", "-o", "x")


def test_a_bad_override(refused):
    message = refused("train-rm", "-r", "sandbox-segment", "--set", "seed", "-o", "x")
    assert "seed" in message


# data


@pytest.mark.parametrize("recipe", ["mine", "sandbox-segment"])
@pytest.mark.parametrize("stage", ["train-rm", "train-ppo"])
def test_missing_data(refused, mine: Path, recipe: str, stage: str):
    name = mine if recipe == "mine" else recipe
    message = refused(stage, "-r", name, "--data", "missing.jsonl", "-o", "x")
    assert "no such file or folder: missing.jsonl" in message


BAD_FILES = {
    "empty.jsonl": (b"", "no rows in ./empty.jsonl"),
    "blank.jsonl": (b"\n \n", "no rows in ./blank.jsonl"),
    "none.json": (b"[]", "no rows in ./none.json"),
    "broken.json": (b"[{", "broken.json:1: broken JSON"),
    "scalar.json": (b"3", "neither a list of rows"),
    "latin.json": ('[{"a": "é"}]'.encode("latin-1"), "latin.json: not UTF-8"),
    "torn.parquet": (b"PAR1 torn", "not a readable parquet file"),
    "notes.txt": (b"a\nb\n", "not a file that is read here"),
    "unusable.jsonl": (b'{}\n{"chosen": 1}\n', "no usable row"),
}


@pytest.mark.parametrize("recipe", ["mine", "sandbox-segment"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_data_that_cannot_be_read(
    refused, mine: Path, here: Path, quick_sandbox, name: str, recipe: str
):
    content, expected = BAD_FILES[name]
    (here / name).write_bytes(content)
    source = mine if recipe == "mine" else recipe
    assert expected in refused("train-rm", "-r", source, "--data", f"./{name}", "-o", "x")


def test_a_folder_that_is_no_data_set(refused, mine: Path, here: Path):
    (here / "data").mkdir()
    assert "cannot read ./data" in refused("train-rm", "-r", mine, "--data", "./data", "-o", "x")


def test_rows_are_too_few_for_a_batch(refused, mine: Path, here: Path):
    (here / "few.jsonl").write_bytes(b"\n".join([*[line(GOOD)] * 5, b"{"]))
    message = refused("train-rm", "-r", mine, "--data", "few.jsonl", "-o", "x")
    assert "not enough data for one batch: 5 rows, reward_model.batch_size is 8" in message
    message = refused("train-rm", "-r", mine, "--set", "reward_model.batch_size=800",
                      "-o", "x")  # fmt: skip
    assert "not enough data for one batch" in message


def test_a_sandbox_with_too_few_rows_is_not_left_behind(refused, quick_sandbox):
    message = refused("train-rm", "-r", "sandbox-segment", "-o", "x", "--set",
                      "reward_model.batch_size=800", "--set",
                      "reward_model.micro_batch_size=8")  # fmt: skip
    assert "not enough data for one batch" in message


# rows

GOOD = {"prompt": "write words", "chosen": "write", "rejected": "words"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "write"}
OTHER = {"role": "assistant", "content": "words"}
BAD_ROWS: dict[str, tuple[object, str]] = {
    "broken": (b'{"prompt": ', "broken JSON"),
    "not UTF-8": (b'{"prompt": "\xe9"}', "not UTF-8"),
    "not an object": ([1], "not an object"),
    "no chosen": ({"prompt": "q", "rejected": "a"}, "no chosen"),
    "empty answer": (GOOD | {"chosen": " "}, "empty answer"),
    "identical": (GOOD | {"rejected": "write"}, "identical answers"),
    "roles": ({"chosen": [ANSWER, USER], "rejected": [USER, OTHER]}, "roles in the wrong order"),
    "prompts": (
        {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "?"}, OTHER]},
        "prompts differ within the pair",
    ),
}


def line(row: object) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def test_bad_rows_are_skipped_counted_and_listed(denserl, mine: Path, here: Path):
    rows = [GOOD] * 20 + [row for row, _ in BAD_ROWS.values()] + [BAD_ROWS["broken"][0]]
    (here / "rows.jsonl").write_bytes(b"\n".join(map(line, rows)))
    code, _, errors = denserl("train-rm", "-r", mine, "--data", "rows.jsonl", "-o", "x")
    assert code == 0, errors
    assert "2 x broken JSON: rows.jsonl:21, rows.jsonl:29" in errors
    for number, (_, reason) in enumerate(list(BAD_ROWS.values())[1:], 22):
        assert f"1 x {reason}: rows.jsonl:{number}" in errors
    listed = (here / "x" / "skipped-train-rm.jsonl").read_text().splitlines()
    assert [json.loads(row)["origin"] for row in listed] == [
        f"rows.jsonl:{n}" for n in range(21, 30)
    ]
    assert [json.loads(row)["reason"] for row in listed[:-1]] == [
        reason for _, reason in BAD_ROWS.values()
    ]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_one_bad_row_stops_strict_data_and_data_with_nothing_else(
    refused, mine: Path, here: Path, name: str
):
    row, reason = BAD_ROWS[name]
    words = ("train-rm", "-r", mine, "--data", "rows.jsonl", "-o", "x")
    (here / "rows.jsonl").write_bytes(line(row))
    message = refused(*words)
    assert "no usable row" in message and f"1 x {reason}: rows.jsonl:1" in message
    (here / "rows.jsonl").write_bytes(b"\n".join([line(GOOD)] * 20 + [line(row)]))
    message = refused(*words, "--set", "data.strict=true")
    assert "1 rows cannot be used" in message and f"1 x {reason}: rows.jsonl:21" in message


def test_rows_that_fail_in_reading_and_in_encoding_are_reported_together(
    refused, mine: Path, here: Path
):
    unknown = {"prompt": "write words", "chosen": "zzz", "rejected": "yyy"}  # to the tokenizer
    (here / "rows.jsonl").write_bytes(b"\n".join(map(line, [b"{", unknown])))
    message = refused("train-rm", "-r", mine, "--data", "rows.jsonl", "-o", "x")
    assert "1 x broken JSON: rows.jsonl:1" in message
    assert "1 x identical answers: rows.jsonl:2" in message


# models


def test_a_model_that_is_not_there(refused, mine: Path):
    message = refused("train-rm", "-r", mine, "--model", "./gone", "-o", "x")
    assert "--model ./gone: model.path: no such file or folder" in message


@pytest.fixture
def model(slots: SandboxFiles, here: Path) -> Path:
    """A copy of the model to spoil."""
    return Path(shutil.copytree(slots.model, here / "model"))


def test_a_tokenizer_without_chat_template(refused, mine: Path, model: Path):
    (model / "chat_template.jinja").unlink()
    message = refused("train-rm", "-r", mine, "--model", model, "-o", "x")
    assert "has no chat template" in message and "model.tokenizer" in message


def test_a_model_without_tokenizer(refused, mine: Path, model: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    message = refused("train-rm", "-r", mine, "--model", model, "-o", "x")
    assert f"cannot load the tokenizer {model}" in message and "model.tokenizer" in message


@pytest.mark.parametrize("granularity", ["segment", "token"])
def test_a_model_that_is_not_causal(refused, mine: Path, model: Path, granularity: str):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    shape = BertConfig(
        vocab_size=len(tokenizer["model"]["vocab"]),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (model / name).unlink()
    BertForMaskedLM(shape).save_pretrained(model)
    cutoff = "1.0" if granularity == "segment" else "null"
    message = refused("train-rm", "-r", mine, "--model", model, "-o", "x", "--set",
                      f"segmentation.granularity={granularity}", "--set",
                      f"segmentation.cutoff={cutoff}")  # fmt: skip
    assert "is not a causal language model" in message


def test_a_model_with_a_torn_file(refused, mine: Path, model: Path):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    message = refused("train-rm", "-r", mine, "--model", model, "-o", "x")
    assert f"cannot load the starting model {model}" in message
    assert "model.safetensors is damaged (100 bytes)" in message


@pytest.mark.parametrize("granularity", ["segment", "bandit"])
def test_packed_weights_of_llama_cpp(refused, mine: Path, model: Path, granularity: str):
    (model / "model.safetensors").rename(model / "model-Q4_K_M.gguf")
    for path in (model, model / "model-Q4_K_M.gguf"):
        message = refused(
            *("train-rm", "-r", mine, "--model", path, "-o", "x"),
            *("--set", f"segmentation.granularity={granularity}"),
            *("--set", f"segmentation.cutoff={1.0 if granularity == 'segment' else 'null'}"),
        )
        assert "4 bits each" in message and "gguf_file='model-Q4_K_M.gguf'" in message


def test_lengths_beyond_a_border_of_positions(refused, mine: Path, model: Path):
    file = model / "config.json"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    changed = {"max_position_embeddings": 16, "rope_parameters": rope}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    message = refused("train-rm", "-r", mine, "--model", model, "-o", "x")
    assert "at most 16 tokens" in message and "data.max_length" in message


def test_a_reward_model_is_no_starting_model(
    refused, mine: Path, finished: Path, slots: SandboxFiles
):
    message = refused("train-rm", "-r", mine, "--model", finished / "reward_model", "-o", "x")
    assert "is a reward model (LlamaForSequenceClassification), not a starting model" in message
    assert str(slots.model) in message  # what it was trained from


def test_weights_that_are_nan(refused, mine: Path, model: Path):
    file, name = model / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(file)
    weights[name][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    message = refused("train-rm", "-r", mine, "--model", model, "-o", "x")
    assert name in message and "NaN or infinite" in message


# runs


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    return Path(shutil.copytree(finished, here / "run"))


@pytest.mark.parametrize("stage", ["fit-function", "train-ppo"])
def test_no_reward_model(refused, mine: Path, stage: str):
    message = refused(stage, "-r", mine, "-o", "x")
    assert "no reward model in x" in message and "train-rm" in message


@pytest.mark.parametrize("stage", ["fit-function", "train-ppo"])
def test_a_reward_model_that_contradicts_the_recipe(refused, mine: Path, run: Path, stage: str):
    message = refused(stage, "-r", mine, "-o", run, "--set", "segmentation.cutoff=2.5")
    assert "segmentation.cutoff is 2.5, the reward model was trained with 1.0" in message


def test_a_missing_normalizer(refused, mine: Path, run: Path):
    message = refused("train-ppo", "-r", mine, "-o", run)
    assert f"no normalizer in {run}" in message
    assert f"denserl fit-function --recipe mine --out {run}" in message


@pytest.mark.parametrize("stage", STAGES)
def test_the_folder_of_another_recipe(refused, run: Path, stage: str):
    message = refused(stage, "-r", "sandbox-segment", "-o", run, "--fresh")
    assert "holds a run of recipe mine, not of sandbox-segment" in message


def test_the_folder_of_something_else(refused, mine: Path, here: Path):
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").write_text("years of work")
    assert "not a denserl run" in refused("train-rm", "-r", mine, "-o", "thesis")
    assert "not a denserl run" in refused("train-rm", "-r", mine, "-o", "thesis/chapter.txt")


def test_other_settings(refused, mine: Path, run: Path):
    message = refused("train-rm", "-r", mine, "-o", run, "--set", "reward_model.batch_size=16")
    assert "reward_model.batch_size was 8, is 16" in message and "--fresh" in message


def test_a_damaged_run(refused, mine: Path, run: Path):
    (run / "run.json").write_text("{")
    assert "run.json is damaged" in refused("train-rm", "-r", mine, "-o", run)


def test_a_damaged_sandbox(refused, mine: Path, run: Path):
    (run / "sandbox").mkdir(exist_ok=True)
    (run / "sandbox" / "settings.json").write_text("")
    message = refused("train-rm", "-r", mine, "-o", run, "--fresh", "--set", "sandbox={pairs: 40}")
    assert "settings.json is damaged" in message and "it is made again" in message


def test_a_failed_fresh_start_loses_nothing(refused, mine: Path, run: Path, here: Path):
    (here / "bad.jsonl").write_text("{}\n")
    assert "no usable row" in refused("train-rm", "-r", mine, "-o", run, "--fresh",
                                      "--data", "bad.jsonl")  # fmt: skip


def test_a_finished_stage_says_so(denserl, mine: Path, run: Path):
    before = tree(run)
    code, output, errors = denserl("train-rm", "-r", mine, "-o", run)
    assert code == 0 and output == "" and "is finished; nothing to do" in errors
    assert tree(run) == before
