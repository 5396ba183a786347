import json
from pathlib import Path

import numpy as np
import pytest

from denserl_cli.core.chat.loading import load_chat
from denserl_cli.core.data.loading import draw_pairs, load_pairs, load_prompts
from denserl_cli.core.data.skipped import Skipped, list_skipped
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.schema import Source
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.sandbox.files import SandboxFiles, with_sandbox_files
from tests.core.conftest import MakeRecipe
from tests.fakes import RecordingObserver

SMALL = (
    "sandbox={phrases: 3, phrase_length: 2, response_phrases: 2, pairs: 4, hidden_size: 16, "
    "layers: 1, fit_steps: 1}"
)


def sandbox_recipe(*settings: str) -> Recipe:
    return load_recipe("sandbox-segment", [SMALL, *settings])


def run_of(recipe: Recipe, folder: Path) -> RunFolder:
    return RunFolder(folder / "run", recipe)


def pairs_file(path: Path, *answers: tuple[str, str]) -> Path:
    rows = [{"prompt": "write words", "chosen": a, "rejected": b} for a, b in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# the sandbox


def test_without_a_sandbox_the_recipe_stays_as_it_is(recipe: MakeRecipe, tmp_path: Path):
    asked = recipe()
    assert with_sandbox_files(asked, run_of(asked, tmp_path), Observer()) is asked
    assert list(tmp_path.iterdir()) == []


def test_the_sandbox_fills_in_what_the_recipe_leaves_open(tmp_path: Path):
    asked = sandbox_recipe()
    filled = with_sandbox_files(asked, run_of(asked, tmp_path), Observer())
    folder = tmp_path / "run" / "sandbox"
    assert filled.model.path == str(folder / "model")
    assert filled.data.preferences == (Source(str(folder / "preferences.jsonl")),)
    assert filled.data.prompts == (Source(str(folder / "prompts.jsonl")),)
    assert run_of(asked, tmp_path).admit("train-rm", "start")


def test_what_the_recipe_names_stays(slots: SandboxFiles, tmp_path: Path):
    own = [f"model.path={slots.model}", f"data.preferences=[{slots.preferences}]"]
    asked = sandbox_recipe(*own)
    filled = with_sandbox_files(asked, run_of(asked, tmp_path), Observer())
    assert filled.model.path == str(slots.model)
    assert filled.data.preferences == (Source(str(slots.preferences)),)
    assert filled.data.prompts[0].path.startswith(str(tmp_path))


def test_the_sandbox_is_made_once(tmp_path: Path):
    asked, recorder = sandbox_recipe(), RecordingObserver()
    for _ in range(2):
        with_sandbox_files(asked, run_of(asked, tmp_path), recorder)
    assert recorder.titles == ["fit the starting model"]


def test_the_sandbox_of_a_release_that_knew_fewer_settings_is_taken(tmp_path: Path):
    asked, recorder = sandbox_recipe(), RecordingObserver()
    files = with_sandbox_files(asked, run_of(asked, tmp_path), recorder)
    made = SandboxFiles.of(Path(files.model.path).parent).settings
    settings = json.loads(made.read_text(encoding="utf-8"))
    del settings["heads"]
    made.write_text(json.dumps(settings), encoding="utf-8")
    with_sandbox_files(asked, run_of(asked, tmp_path), recorder)
    assert recorder.titles == ["fit the starting model"]


@pytest.mark.parametrize("setting", ["seed=7", "sandbox.pairs=5"])
def test_another_sandbox_needs_another_folder(tmp_path: Path, setting: str):
    asked = sandbox_recipe()
    with_sandbox_files(asked, run_of(asked, tmp_path), Observer())
    other = sandbox_recipe(setting)
    with pytest.raises(DenserlError, match="made with other settings or another seed") as caught:
        with_sandbox_files(other, run_of(other, tmp_path), Observer())
    assert caught.value.hint and "--out" in caught.value.hint


# data


def test_pairs_are_held_out_or_have_their_own_source(
    recipe: MakeRecipe, slots: SandboxFiles, tmp_path: Path
):
    _, chat = load_chat(recipe())
    split = load_pairs(recipe(), chat, Observer())
    assert (len(split.train), len(split.evaluation), split.skipped) == (58, 6, [])  # a tenth
    again = load_pairs(recipe("seed=5"), chat, Observer())
    assert [r.origin for r in split.evaluation] == [r.origin for r in again.evaluation]
    own = pairs_file(tmp_path / "own.jsonl", ("words", "write"))
    named = load_pairs(recipe(f"data.evaluation=[{own}]"), chat, Observer())
    assert (len(named.train), len(named.evaluation)) == (64, 1)


def test_rows_that_cannot_be_used_are_counted(recipe: MakeRecipe, tmp_path: Path):
    file = pairs_file(tmp_path / "a.jsonl", ("write", "words"), ("a", "a"), ("", "b"))
    held = pairs_file(tmp_path / "b.jsonl", ("a", "a"), ("write", "words"))
    asked = recipe(f"data.preferences=[{file}]", f"data.evaluation=[{held}]")
    _, chat = load_chat(asked)
    recorder = RecordingObserver()
    found = load_pairs(asked, chat, recorder)
    assert len(found.train) == len(found.evaluation) == 1
    assert recorder.notices == [
        f"skipped 2 x identical answers: {file}:2, {held}:1",
        f"skipped 1 x empty answer: {file}:3 (column chosen)",
    ]
    assert [row.origin for row in found.skipped] == [f"{file}:2", f"{file}:3", f"{held}:1"]


def test_strict_data_stops_at_the_first_file_with_a_bad_row(recipe: MakeRecipe, tmp_path: Path):
    file = pairs_file(tmp_path / "a.jsonl", ("write", "words"), ("a", "a"))
    asked = recipe(f"data.preferences=[{file}]", "data.strict=true")
    with pytest.raises(DenserlError, match=r"1 x identical answers: .*a\.jsonl:2"):
        load_pairs(asked, load_chat(asked)[1], Observer())


def test_what_is_cut_is_counted(recipe: MakeRecipe, tmp_path: Path):
    # the prompt is 5 tokens long, the longer responses of the pairs are 4 and 2
    file = pairs_file(tmp_path / "a.jsonl", ("write words about", "words"), ("write", "words"))
    asked = recipe(
        f"data.preferences=[{file}]",
        "data.max_length=8",
        "data.max_prompt_length=4",
        "ppo.max_prompt_length=4",
    )
    _, chat = load_chat(asked)
    recorder = RecordingObserver()
    pairs = load_pairs(asked, chat, recorder)
    prompts = load_prompts(asked, chat, recorder)
    assert recorder.notices == [
        "1 pairs were cut to data.max_length 8",
        "64 prompts were cut on the left to ppo.max_prompt_length 4",
    ]
    assert [len(pair.prompt) for pair in pairs.train] == [4, 5]
    assert {len(prompt.ids) for prompt in prompts.train} == {4}
    assert len(prompts.train) + len(prompts.evaluation) == 64


def test_skipped_rows_are_listed_in_the_run_folder(recipe: MakeRecipe, tmp_path: Path):
    run, recorder = run_of(recipe(), tmp_path), RecordingObserver()
    file = run.skipped_file("train-rm")
    list_skipped([], file, recorder)
    assert not run.path.exists() and recorder.notices == []
    list_skipped([Skipped("f:2", "empty answer", "chosen")], file, recorder)
    assert file == run.path / "skipped-train-rm.jsonl"
    assert json.loads(file.read_text()) == {
        "origin": "f:2", "reason": "empty answer", "detail": "chosen"
    }  # fmt: skip
    assert recorder.notices == [f"all skipped rows are listed in {file}"]


def test_the_recipe_says_how_conversations_are_written(recipe: MakeRecipe):
    tokenizer, chat = load_chat(recipe("chat.stop_tokens=['<|user|>']"))
    assert chat.stop_ids == (5, tokenizer.convert_tokens_to_ids("<|user|>"))
    with pytest.raises(DenserlError, match=r"chat\.terminator: .* has no token 'nothing'"):
        load_chat(recipe("chat.terminator=nothing"))


def test_a_draw_takes_alike_from_each_source_before_it_tokenises(
    recipe: MakeRecipe, tmp_path: Path
):
    files = [
        str(pairs_file(tmp_path / f"{name}.jsonl", *((f"bala {name}{i}", "x") for i in range(n))))
        for name, n in (("a", 60), ("b", 20))
    ]
    asked, recorder = (
        recipe(f"data.preferences=[{files[0]}]", f"data.evaluation=[{files[1]}]"),
        RecordingObserver(),
    )
    _, chat = load_chat(asked)

    def drawn(count: int, seed: int = 1) -> list[str]:
        rows, skipped = draw_pairs(asked, chat, count, seed, recorder)
        assert not skipped
        return [row.origin for row in rows]

    few = drawn(8)
    assert len(set(few)) == 8 and sum(origin.startswith(files[0]) for origin in few) == 6
    assert few == drawn(8) != drawn(8, seed=2)
    everything = load_pairs(asked, chat, recorder).everything
    order = np.random.default_rng(1).permutation(80)
    assert drawn(100) == [everything[i].origin for i in order]


def test_what_cannot_be_counted_is_read_whole(recipe: MakeRecipe, tmp_path: Path):
    rows = [{"prompt": "write words", "chosen": f"bala {i}", "rejected": "x"} for i in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    asked = recipe(f"data.preferences=[{tmp_path / 'rows.json'}]")
    found, _ = draw_pairs(asked, load_chat(asked)[1], 4, 1, Observer())
    assert len(found) == 4
