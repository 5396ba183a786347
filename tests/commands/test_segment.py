"""denserl segment: what it prints, for people and for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from tests import tiny

TEXT = "bala dare fabo mago nanu pata"


def segment(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(
        app, ["segment", "-r", "sandbox-segment", "-o", str(folder), *tiny.words(), *words]
    )


def document(folder: Path, *words: str) -> dict[str, Any]:
    result = segment(folder, "--json", *words)
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def joined(response: dict[str, Any]) -> str:
    return "".join(part["text"] for part in response["segments"])


def test_a_text(scored: Path):
    prompt = "write calm words about rivers"
    (response,) = document(scored, "--text", TEXT, "--prompt", prompt)["responses"]
    assert joined(response) == TEXT
    assert (response["label"], response["prompt"]) == ("text", prompt)
    assert isinstance(response["score"], float)
    assert all(isinstance(part["reward"], float) for part in response["segments"])


def test_a_file(scored: Path, tmp_path: Path):
    file = tmp_path / "answer.txt"
    file.write_text(TEXT)
    (response,) = document(scored, "--file", str(file))["responses"]
    assert (joined(response), response["label"]) == (TEXT, str(file))


def test_data(scored: Path, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": f"write {n}", "chosen": TEXT, "rejected": f"{TEXT} {TEXT}"} for n in range(3)
    ]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    responses = document(scored, "--data", str(file), "--limit", "2")["responses"]
    assert [joined(response) for response in responses] == [TEXT, f"{TEXT} {TEXT}"] * 2
    assert [r["label"] for r in responses][:2] == [f"{file}:1 chosen", f"{file}:1 rejected"]


def test_the_recipes_data(scored: Path):
    found = document(scored, "--limit", "1")
    assert (found["granularity"], found["cutoff"], len(found["responses"])) == ("segment", 1.0, 2)
    chosen, rejected = found["responses"]
    place, side = chosen["label"].split()
    rows = (scored / "sandbox" / "preferences.jsonl").read_text().splitlines()
    row = json.loads(rows[int(place.rsplit(":", 1)[1]) - 1])
    assert side == "chosen" and joined(chosen) == row["chosen"][-1]["content"]
    assert joined(rejected) == row["rejected"][-1]["content"]


def test_for_people(scored: Path):
    result = segment(scored, "--text", TEXT, "--prompt", "write calm words about rivers")
    assert result.exit_code == 0
    assert re.search("bala dare fabo[⁺⁻·]+▲ mago nanu pata[⁺⁻·]+\n", result.stdout)
    assert re.search(r"entropy\s+raw\s+reward\s+per token\s+text", result.stdout)


def test_a_page(scored: Path, tmp_path: Path):
    file = tmp_path / "new" / "page.html"
    result = segment(scored, "--limit", "3", "--html", str(file))
    assert result.exit_code == 0, result.exception
    assert result.stdout == "" and f"wrote {file}: 6 responses" in result.stderr
    page = file.read_text()
    assert page.startswith("<!doctype html>") and "Segments of sandbox-segment" in page


def test_statistics(scored: Path):
    words = ("--stats", "--cutoffs", "0.2,3", "--limit", "5")
    found = document(scored, *words)
    assert found["responses"] == 10
    assert [one["cutoff"] for one in found["cutoffs"]] == [0.2, 1.0, 3.0]
    whole = found["cutoffs"][-1]
    assert whole["counts"] == {"1": 10} and whole["segments"] == 10
    own = document(scored, "--limit", "5")["responses"]
    assert found["cutoffs"][1]["segments"] == sum(len(one["segments"]) for one in own)
    printed = segment(scored, *words).stdout
    assert "10 responses" in printed and "1 *" in printed and "the recipe's cutoff" in printed


def test_two_cutoffs_compared(scored: Path):
    found = document(scored, "--compare", "99", "--limit", "2")
    first, second = found["views"]
    assert (first["name"], second["name"]) == ("sandbox-segment, cutoff 1", "cutoff 99")
    assert all(len(one["segments"]) == 1 for one in second["responses"])
    assert found["agreement"]["segments"][1] == 4 and found["agreement"]["shared"] == 0
    printed = segment(scored, "--compare", "99", "--limit", "1").stdout
    assert "A (sandbox-segment, cutoff 1)" in printed and "B (cutoff 99)" in printed
    assert "F1 0.000" in printed


def test_before_anything_is_trained(tmp_path: Path):
    (response,) = document(tmp_path / "new", "--text", TEXT)["responses"]
    assert joined(response) == TEXT and response["score"] is None
    assert not (tmp_path / "new" / "reward_model").exists()


@pytest.mark.parametrize("trained", [True, False])
def test_calibrate(trained: bool, scored: Path, tmp_path: Path):
    folder = scored if trained else tmp_path / "new"
    found = document(folder, "--calibrate", "3")
    assert found["segment_length"] == 3.0 and found["responses"] > 100
    words = ["--set", f"segmentation.cutoff={found['cutoff']}"]
    parts = [
        part
        for response in document(tmp_path / "other", *words, "--limit", "40")["responses"]
        for part in response["segments"]
    ]
    lengths = [part["end"] + 1 - part["start"] for part in parts]
    assert sum(lengths) / len(lengths) == pytest.approx(3, rel=0.15)


def test_calibrate_for_people_names_the_setting(scored: Path):
    before = (scored / "recipe.yaml").read_text()
    result = segment(scored, "--calibrate", "3", "--set", "run.log_samples=9")
    cutoff = re.search(r"cutoff (\d\.\d{4}) nats", result.stdout)
    assert cutoff and f"--set segmentation.cutoff={cutoff[1]}" in result.stdout
    assert (scored / "recipe.yaml").read_text() == before


def test_calibrate_for_a_recipe_that_has_no_cutoff(tmp_path: Path):
    result = CliRunner().invoke(
        app,
        [
            *("segment", "-r", "sandbox-token", "-o", str(tmp_path / "new")),
            *("--calibrate", "3", "--json", *tiny.words("segmentation.cutoff=0.5")),
        ],
    )
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["cutoff"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", " "], "the text to segment is empty"),
        (["--text", "a", "--file", "b"], "--text and --file exclude each other"),
        (["--file", "gone.txt"], "--file gone.txt"),
        (["--calibrate", "0.5"], "a segment cannot have 0.5 tokens"),
        (["--calibrate", "3", "--html", "a.html"], "--calibrate makes no page"),
        (["--stats", "--compare", "2"], "--stats and --compare exclude each other"),
        (["--stats", "--text", "a"], "--stats is about a data set"),
        (["--cutoffs", "1,2"], "--cutoffs belongs to --stats"),
        (["--stats", "--cutoffs", "1,x"], "--cutoffs 1,x: not a list of cutoffs"),
        (["--compare", "-1"], "-1 cannot be a cutoff"),
        (["--compare", "gone/away"], "neither a number nor a run folder nor a recipe"),
        (["--html", "."], "--html . is a folder"),
        (["--html", "/proc/version/page.html"], "cannot be written"),
    ],
)
def test_wrong_options_are_one_message(words: list[str], message: str, scored: Path):
    result = segment(scored, *words)
    assert isinstance(result.exception, DenserlError)
    assert result.exception.exit_code == 2 and message in result.exception.message


def test_a_file_that_is_no_text_is_named(scored: Path, tmp_path: Path):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\xff")
    result = segment(scored, "--file", str(tmp_path / "x.bin"))
    assert isinstance(result.exception, DenserlError) and result.exception.hint


def test_a_dry_run_writes_nothing(tmp_path: Path):
    result = segment(tmp_path / "new", "--dry-run")
    assert result.exit_code == 0 and result.stdout.startswith("# stage: segment\n")
    assert list(tmp_path.iterdir()) == []
