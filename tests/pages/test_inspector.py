"""The inspector's page in a browser, made by real runs: what it cuts, shows, finds and escapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.inspection.compare import View, agreement
from denserl_cli.core.inspection.inspector import Inspector, answers_of
from denserl_cli.core.inspection.statistics import at
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.segmentation import segment_ends
from denserl_cli.core.stages.run import run_stage
from denserl_cli.pages.inspector import inspector_page, rounded
from tests import tiny
from tests.core.fake_tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Page

Opener = Callable[..., "Page"]

TEXTS = (
    "two 🤖👩‍🚀 robots, é and ñ",
    "<script>document.title = 'taken'</script> & <b>bold</b>",
    "مرحبا بالعالم, שלום",
    "```\ndef f(x):\n    return x\n```\n",
    "日本語👍🏽.",
    "plain words",
)


def settings(model: Path, pairs: Path) -> list[str]:
    data = json.dumps([{"path": str(pairs)}])
    return [
        "sandbox=null",
        f"model.path={model}",
        f"data.preferences={data}",
        "data.eval_pairs=0",
        "segmentation.cutoff=auto",
        "segmentation.segment_length=4",
        "reward_model.batch_size=2",
        "reward_model.micro_batch_size=2",
    ]


class Run:
    """A trained reward model of a tokenizer whose tokens are bytes, and what it says of `TEXTS`."""

    def __init__(self, parent: Path) -> None:
        tokenizer = byte_tokenizer(eos_token="<end>", pad_token="<pad>")
        model, pairs = parent / "model", parent / "pairs.jsonl"
        tiny.causal_lm(vocabulary=len(tokenizer), layers=1).save_pretrained(model)
        tokenizer.save_pretrained(model)
        rows = [
            {"prompt": f"say {n} </script>", "chosen": text, "rejected": TEXTS[n - 1]}
            for n, text in enumerate(TEXTS)
        ]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.settings, self.folder = settings(model, pairs), parent / "run"
        recipe = tiny.recipe(*self.settings)
        run_stage("train-rm", recipe, self.folder, "start", Observer())
        folder = RunFolder(self.folder, recipe)
        made_for = {"kind": "location", "granularity": "segment"}
        cutoff = RewardRecord.load(folder.reward_model).cutoff
        LocationNormalizer(0.1, 0.2, 0.1, 1.5).save(
            folder.normalizer, {**made_for, "cutoff": cutoff}
        )
        inspector = Inspector(recipe, folder, Observer())
        self.answers = answers_of(inspector.recipe, 100, Observer())
        self.view = View.of("run", inspector, self.answers, Observer())

    def page(self, name: str, *words: str) -> Path:
        """What `denserl segment --html` writes."""
        file = self.folder / name
        command = ["segment", "-r", "sandbox-segment", "-o", str(self.folder)]
        result = CliRunner().invoke(
            app, [*command, *tiny.words(*self.settings), "--html", str(file), *words]
        )
        assert result.exit_code == 0, result.exception
        return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield Run(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def written(run: Run) -> Path:
    return run.page("page.html")


def texts(page: Page) -> list[str]:
    return [text.text_content() or "" for text in page.locator(".answer").all()]


def bars(page: Page) -> list[list[float]]:
    """Heights of the reward bars of each response that is shown."""
    return page.evaluate(
        "[...document.querySelectorAll('main .chart')].map("
        "chart => [...(chart.data.find(one => one.type === 'bar')?.y ?? [])])"
    )


def segments_at(page: Page, cutoff: float) -> list[list[dict[str, Any]]]:
    """What the page's script makes of every response of its first view."""
    return page.evaluate(
        "cutoff => { const data = JSON.parse(document.getElementById('data').textContent);"
        "return data.traces[0].map(trace => denserl.segments(trace, data.views[0], cutoff)); }",
        cutoff,
    )


def test_the_page_shows_what_the_command_prints(run: Run, written: Path, open_page: Opener):
    page = open_page(written)
    assert page.locator("#position").inner_text() == f"1 of {len(TEXTS)}"
    chosen, rejected = run.view.traces[:2]
    assert texts(page) == [chosen.text, rejected.text]
    for panel, trace in zip(page.locator(".side").all(), (chosen, rejected), strict=True):
        response = run.view.cut(trace)
        assert panel.locator(".segment").count() == len(response.segments)
        assert f"score {response.score:.3f}" in panel.locator("p").inner_text()
        panel.locator("summary").click()
        panel.locator("tbody tr").first.wait_for()  # the table is made when it is unfolded
        assert panel.locator("tbody tr").count() == len(response.segments)
        first = panel.locator("tbody tr").first.locator("td").all_inner_texts()
        part = response.segments[0]
        assert first[:2] == ["1", str(part.end - part.start + 1)]
        assert float(first[4]) == pytest.approx(part.reward, abs=1e-3)
    assert bars(page)[0] == pytest.approx(
        [s.reward for s in run.view.cut(chosen).segments], abs=1e-3
    )


def test_the_page_cuts_and_rewards_as_the_core_does(run: Run, written: Path, open_page: Opener):
    page = open_page(written)
    own = run.view.cut.cutoff
    entropies = np.concatenate([trace.entropy for trace in run.view.traces])
    near = [round(float(value), 4) for value in np.random.default_rng(0).choice(entropies, 20)]
    for cutoff in [own, 0.0, 99.0, *near]:
        cut = at(run.view.cut, cutoff)
        for parts, trace in zip(segments_at(page, cutoff), run.view.traces, strict=True):
            segments = cut(trace).segments
            assert [part["end"] for part in parts] == [s.end for s in segments]
            for part, segment in zip(parts, segments, strict=True):
                assert part["start"] == segment.start
                assert part["value"] == pytest.approx(segment.value, abs=1e-4)
                assert part["reward"] == pytest.approx(segment.reward, abs=1e-3)
                assert part["perToken"] == pytest.approx(segment.per_token, abs=1e-3)


@pytest.mark.parametrize("weight", [1e-4, 40.0])
def test_the_page_weighs_rewards_as_ppo_does(
    weight: float, run: Run, tmp_path: Path, open_page: Opener
):
    rewards = run.view.cut.rewards._replace(clip=0.5)
    view = run.view._replace(cut=run.view.cut._replace(rewards=rewards, weight=weight))
    file = tmp_path / "weighed.html"
    file.write_text(inspector_page("p", [], [view]), encoding="utf-8")
    page = open_page(file)
    found = segments_at(page, view.cut.cutoff)
    for parts, trace in zip(found, view.traces, strict=True):
        expected = [segment.per_token for segment in view.cut(trace).segments]
        assert [part["perToken"] for part in parts] == pytest.approx(expected, abs=1e-3 * weight)
    page.locator("summary", has_text="Table").first.click()
    page.locator("tbody tr").first.wait_for()
    cells = page.locator("tbody").first.locator("tr td:nth-child(6)").all_inner_texts()
    given = [part["perToken"] for part in found[0]]
    assert [float(cell) for cell in cells] == pytest.approx(given, rel=5e-3)  # three digits


def test_the_rule_holds_for_any_response(written: Path, open_page: Opener):
    page, rng = open_page(written), np.random.default_rng(1)
    cases = []
    for count in (1, 2, 3, 40):
        for ended in (True, False):
            entropy = rng.exponential(1.0, count).astype(np.float32)
            for cutoff in (0.0, 0.7, 1.2345, float(entropy[0])):
                cases.append((entropy, ended, cutoff))
    asked = [
        [rounded(entropy, [cutoff]).tolist(), len(entropy), ended, cutoff]
        for entropy, ended, cutoff in cases
    ]
    found = page.evaluate("cases => cases.map(one => denserl.segmentEnds(...one))", asked)
    for ends, (entropy, ended, cutoff) in zip(found, cases, strict=True):
        expected = segment_ends(
            torch.from_numpy(entropy)[None],
            torch.ones(1, len(entropy), dtype=torch.bool),
            granularity="segment",
            cutoff=cutoff,
            terminated=torch.tensor([ended]),
        )[0]
        assert ends == torch.nonzero(expected)[:, 0].tolist()


def test_rounding_changes_no_segment():
    rng = np.random.default_rng(2)
    grid = np.arange(0, 30_000, 7) / 10_000
    exact = rng.exponential(1.0, 3000).astype(np.float32)
    exact[:500] = grid[:500].astype(np.float32)  # as a float32, a little above or below
    own = [float(exact[700]), float(np.nextafter(exact[701], np.float32(9))), 1.23456789]
    short = rounded(exact, sorted(own, reverse=True))
    for cutoff in [*grid, *own]:
        above = (torch.from_numpy(exact) > float(cutoff)).numpy()
        assert ((short > cutoff) == above).all(), cutoff
    assert max(len(repr(v)) for v in short[~np.isin(short, own)].tolist()) <= 7


def test_the_slider_cuts_anew_and_rewards_follow(run: Run, written: Path, open_page: Opener):
    page = open_page(written)
    before = bars(page)
    slider = page.locator(".slider")
    slider.fill(slider.get_attribute("max"))
    page.wait_for_function("document.querySelectorAll('.segment:not(.sample)').length === 2")
    high = at(run.view.cut, 99.0)
    expected = [[s.reward for s in high(trace).segments] for trace in run.view.traces[:2]]
    assert bars(page) == [pytest.approx(each, abs=1e-3) for each in expected]
    assert "were made for" in page.locator(".summary").inner_text()
    line = page.evaluate("document.querySelector('main .chart').layout.shapes[0].y0")
    assert line == float(slider.get_attribute("max"))
    page.locator(".exact").fill("0")
    count = sum(len(at(run.view.cut, 0.0)(t).segments) for t in run.view.traces[:2])
    page.wait_for_function(f"document.querySelectorAll('.answer .segment').length === {count}")
    page.locator(".reset").click()
    page.wait_for_function(f"document.querySelectorAll('.answer .segment').length === "
                           f"{sum(map(len, before))}")  # fmt: skip
    assert bars(page) == before
    page.locator("#measure").select_option("value")
    raw = [s.value for s in run.view.cut(run.view.traces[0]).segments]
    assert bars(page)[0] == pytest.approx(raw, abs=1e-3)


def test_search(run: Run, written: Path, open_page: Opener):
    page = open_page(written)
    page.locator("#search").fill("日本語")
    assert page.locator("#position").inner_text() == "1 of 2"
    assert "日本語" in "".join(texts(page))
    assert page.locator("#list li").count() == 2
    page.locator("#search").fill("SAY 3")
    assert page.locator("main .prompt").inner_text() == "say 3 </script>"
    page.locator("#search").fill("nowhere")
    assert page.locator("#position").inner_text() == "no match"
    page.locator("#search").fill("")
    assert page.locator("#position").inner_text().endswith(f"of {len(TEXTS)}")


def test_keys(run: Run, written: Path, open_page: Opener):
    page = open_page(written)
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.locator("#position").inner_text() == f"2 of {len(TEXTS)}"
    page.keyboard.press("/")
    page.keyboard.type("j")  # a letter of a search, not a command
    assert page.locator("#search").input_value() == "j"
    page.locator("#search").fill("")
    page.keyboard.press("Escape")
    own = page.locator(".exact").input_value()
    page.keyboard.press("[")
    assert float(page.locator(".exact").input_value()) == pytest.approx(float(own) - 0.05, abs=1e-4)
    page.keyboard.press("0")
    assert page.locator(".exact").input_value() == own
    page.locator(".answer .segment").first.focus()
    page.keyboard.press("ArrowRight")
    count = len(run.view.cut(run.view.traces[2]).segments)
    assert page.evaluate("document.activeElement.dataset.k") == "1"
    assert f"segment 2 of {count}" in page.locator("#tip").inner_text()
    label = page.locator(".answer .segment").nth(1).get_attribute("aria-label")
    assert label.startswith(f"segment 2 of {count}: ") and "normalised reward" in label


def test_a_token_tells_its_entropy_and_value(run: Run, written: Path, open_page: Opener):
    page = open_page(written)
    page.locator(".answer [data-j='2']").first.hover()
    told, trace = page.locator("#tip").inner_text(), run.view.traces[0]
    assert f"entropy {rounded(trace.entropy)[2]:.3f} nats" in told
    assert f"reward model {trace.values[2]:.3f}" in told and "raw reward" in told


def test_text_is_text(run: Run, written: Path, open_page: Opener):
    page = open_page(written)
    shown = []
    for _ in TEXTS:
        shown += texts(page)
        page.keyboard.press("j")
    assert shown == [trace.text for trace in run.view.traces]
    assert any(TEXTS[1] in text for text in shown)
    assert page.title() == "Segments of sandbox-segment"
    assert page.locator("main b").count() == 0


def test_a_character_of_several_tokens_is_whole(run: Run, written: Path, open_page: Opener):
    page = open_page(written)
    robot = page.locator(".answer [data-j]", has_text="🤖").first
    assert robot.text_content() == "🤖"
    place = int(robot.get_attribute("data-j"))
    parts = [page.locator(f".answer [data-j='{place - back}']").first for back in (1, 2, 3)]
    assert [part.get_attribute("class") for part in parts] == ["part"] * 3


@pytest.mark.parametrize("dark", [False, True])
def test_phone_light_and_dark(dark: bool, written: Path, open_page: Opener):
    page = open_page(written, width=390, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ink = page.evaluate("getComputedStyle(document.body).color")
    chart = page.evaluate("document.querySelector('main .chart').layout.font.color")
    assert (chart == "#e6e9ed") == dark and ink == (
        "rgb(230, 233, 237)" if dark else "rgb(27, 31, 36)"
    )
    page.emulate_media(color_scheme="light" if dark else "dark")
    now = "document.querySelector('main .chart').layout.font.color"
    page.wait_for_function(f"{now} !== '{chart}'")


def test_statistics_are_a_table_and_charts(run: Run, open_page: Opener):
    page = open_page(run.page("stats.html", "--stats", "--cutoffs", "1,2,3"))
    rows = page.locator("#statistics tbody tr")
    assert rows.count() == 4
    names = page.evaluate("document.getElementById('lengths').data.map(line => line.name)")
    assert names == [f"{c:.4g}" for c in sorted([1, 2, 3, run.view.cut.cutoff])]
    shares = page.evaluate("document.getElementById('counts').data.map(line => line.y.at(-1))")
    assert shares == [1.0] * 4


def test_two_cutoffs_stand_side_by_side(run: Run, open_page: Opener):
    page = open_page(run.page("compare.html", "--compare", "2.5"), width=1600)
    assert page.locator(".side h2").all_inner_texts() == [
        "chosen A", "chosen B", "rejected A", "rejected B",
    ]  # fmt: skip
    first = [run.view.cut(trace) for trace in run.view.traces]
    found = agreement(first, [at(run.view.cut, 2.5)(trace) for trace in run.view.traces])
    told = page.locator("#agreement").inner_text()
    assert f"both have {found.shared} (F1 {found.f1:.3f})" in told
    boxes = [page.locator(".side").nth(k).bounding_box() for k in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    page.locator(".slider").nth(1).fill(page.locator(".slider").nth(1).get_attribute("max"))
    page.wait_for_function("document.getElementById('agreement').innerText.includes('both have 0')")


def test_before_training_there_are_no_rewards(run: Run, open_page: Opener):
    blind = [replace(run.view.traces[0], values=None)]
    file = run.folder / "blind.html"
    view = View("run", run.view.cut._replace(normalizer=None, ready=False), blind)
    file.write_text(inspector_page("t", [], [view]), encoding="utf-8")
    page = open_page(file)
    assert page.locator("#measure").count() == 0 and bars(page) == [[]]
    page.locator("#toolbar summary").click()
    page.get_by_text("no reward model").first.wait_for()
    assert "no reward model" in page.locator("#toolbar").inner_text()


def test_a_recipe_without_a_cutoff_has_no_slider(run: Run, open_page: Opener):
    cut = run.view.cut._replace(granularity="token", cutoff=None)
    traces = [replace(trace, ends=np.ones(len(trace.texts), bool)) for trace in run.view.traces[:1]]
    file = run.folder / "token.html"
    file.write_text(inspector_page("t", [], [View("run", cut, traces)]), encoding="utf-8")
    page = open_page(file)
    assert page.locator(".slider").count() == 0
    assert page.locator(".answer .segment").count() == len(traces[0].texts)
    assert page.locator(".answer .peak").count() == 0
    page.keyboard.press("]")


def test_many_long_responses_are_a_file_to_mail(run: Run):
    rng, count = np.random.default_rng(3), 20
    words = [f" {word}" for word in "the of and segment reward model entropy language".split()]
    traces = [
        replace(
            run.view.traces[0],
            texts=rng.choice(words, 1000).tolist(),
            entropy=rng.exponential(2.0, 1000).astype(np.float32),
            values=rng.normal(0, 3, 1000).astype(np.float32),
        )
        for _ in range(count)
    ]
    one, many = (
        len(inspector_page("t", [], [run.view._replace(traces=some)]).encode())
        for some in (traces[:1], traces)
    )
    assert one + (many - one) / (count - 1) * 499 < 25e6
