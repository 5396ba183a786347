"""What the segments of a real model look like: lengths by cutoff, and where the cuts fall.

    python benchmarks/segments.py read --model runs/real/model --pairs eval.jsonl \
        --results benchmarks/results/segments.json
    python benchmarks/segments.py report --results benchmarks/results/segments.json \
        --to docs/study/segments.md

`read` takes the first 300 pairs, both sides, as `smollm2-segment` encodes them, and keeps counts
and the first ten answers in segments. `report` writes the tables behind docs/segments.md from them.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from denserl_cli.core.inspection.inspector import Answer, Inspector
from denserl_cli.core.inspection.traces import Trace
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.segmentation import calibrate_cutoff
from denserl_cli.terminal.dashboard import make_observer

RECIPE = "smollm2-segment"
SIDES = ("chosen", "rejected")
PAIRS, SHOWN = 300, 10
LENGTHS = (4, 6, 8, 12, 16)
"""Mean lengths whose cutoffs are shown beside whole numbers of nats."""
CUTOFFS = (1.0, 2.0, 3.0, 4.0, 5.0)
PLACES = {
    "a word begins": r"(?=\s+\S)|(?<=\s)(?=\S)",
    "after punctuation": r"(?<=[.,;:!?…)\]\"”’])(?=\s|$)",
    "a clause ends": r"(?<=[.!?…;:,–—])[\"”’)\]]*(?=\s|$)",
    "a sentence ends": r"(?:(?<=[.!?…])[\"”’)\]]*(?=\s|$))|(?=\s*\n)|(?<=\n)",
}
"""Where a cut is counted as being, by the text on both sides of it."""


def main() -> None:
    """Read answers, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("read")
    reading.add_argument("--model", required=True)
    reading.add_argument("--pairs", type=Path, required=True)
    reading.add_argument("--results", type=Path, required=True)
    reporting = commands.add_parser("report")
    reporting.add_argument("--results", type=Path, required=True)
    reporting.add_argument("--to", type=Path, required=True)
    asked = parser.parse_args()
    if asked.command == "read":
        found = measure(asked.model, asked.pairs)
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, ensure_ascii=False, indent=1)
        asked.results.write_text(text + "\n", encoding="utf-8")
    else:
        text = report(json.loads(asked.results.read_text(encoding="utf-8")))
        asked.to.write_text(text + "\n", encoding="utf-8")


def measure(model: str, pairs: Path) -> dict[str, Any]:
    """Lengths and places of the cuts in the first answers of a file, at several cutoffs."""
    settings = [f"model.path={model}", f"data.preferences={pairs}", "segmentation.cutoff=1.0"]
    recipe = load_recipe(RECIPE, settings)
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()[:PAIRS]]
    answers = [
        Answer(f"line {n} {side}", row[side]) for n, row in enumerate(rows, 1) for side in SIDES
    ]
    with make_observer() as observer, tempfile.TemporaryDirectory() as made:
        inspector = Inspector(recipe, RunFolder(Path(made), recipe), observer, rewards=False)
        traces = inspector.trace([inspector.encode(answer) for answer in answers], observer)
    cutoffs = {f"mean of {n} tokens": _cutoff(traces, n) for n in LENGTHS}
    cutoffs |= {f"{c:g} nats": c for c in CUTOFFS}
    chosen = inspector.cut._replace(cutoff=cutoffs["mean of 8 tokens"])
    return {
        "answers": len(traces),
        "tokens": sum(len(trace.texts) for trace in traces),
        "truncated": sum(not trace.terminated for trace in traces),
        "places": sum(map(_inside, traces)),
        "cutoffs": [
            {
                "name": name,
                "cutoff": cutoff,
                **_counted(inspector.cut._replace(cutoff=cutoff), traces),
            }
            for name, cutoff in sorted(cutoffs.items(), key=lambda item: item[1])
        ],
        "everywhere": shares([(t.texts, range(_inside(t))) for t in traces]),
        "examples": [
            {"label": t.label, "prompt": t.prompt, "segments": [s.text for s in chosen(t).segments]}
            for t in traces[:SHOWN]
        ],
    }


def _cutoff(traces: Sequence[Trace], length: int) -> float:
    """The cutoff that cuts the answers into segments of `length` tokens on average."""
    entropies = [torch.from_numpy(trace.entropy) for trace in traces]
    return calibrate_cutoff(
        pad_sequence(entropies, batch_first=True),
        pad_sequence([torch.ones(len(one), dtype=torch.bool) for one in entropies], True),
        length,
        torch.tensor([trace.terminated for trace in traces]),
    )


def _inside(trace: Trace) -> int:
    """Number of tokens after which an answer could be cut: all but the last and the terminator."""
    return len(trace.texts) - 1 - trace.terminated


def _counted(cut: Any, traces: Sequence[Trace]) -> dict[str, Any]:
    """Lengths of segments, and places of the cuts inside answers."""
    lengths, cuts = [], []
    for trace in traces:
        ends = np.flatnonzero(cut.ends(trace)[0].numpy())
        lengths.extend(np.diff(ends, prepend=-1).tolist())
        cuts.append((trace.texts, ends[:-1].tolist()))
    return {
        "segments": len(lengths),
        "mean": float(np.mean(lengths)),
        "quantiles": [float(q) for q in np.quantile(lengths, (0.1, 0.25, 0.5, 0.75, 0.9, 0.99))],
        "longest": max(lengths),
        "places": shares(cuts),
    }


def shares(cuts: Sequence[tuple[Sequence[str], Sequence[int]]]) -> dict[str, float]:
    """How often the position after certain tokens is one where a word begins, or a sentence ends.

    Args:
        cuts: Of each answer the texts of its tokens, and the tokens after which it is cut.
    """
    found = {name: 0 for name in PLACES}
    total = 0
    for texts, ends in cuts:
        for name, places in _places(texts).items():
            found[name] += sum(places[end] for end in ends)
        total += len(ends)
    return {name: count / max(1, total) for name, count in found.items()}


def _places(texts: Sequence[str]) -> dict[str, list[bool]]:
    """For each kind of place and each token, whether the position after the token is one."""
    whole = "".join(texts)
    positions = np.cumsum([len(text) for text in texts]).tolist()
    return {
        name: [place in matched for place in positions]
        for name, pattern in PLACES.items()
        for matched in [set(_matches(pattern, whole))]
    }


def _matches(pattern: str, text: str) -> Iterator[int]:
    """Where a pattern ends in a text, empty matches included."""
    return (match.end() for match in re.finditer(pattern, text))


def report(found: dict[str, Any]) -> str:
    """The tables and examples, in Markdown."""
    lines = [
        "# Segments of SmolLM2-135M-Instruct on real answers",
        "",
        f"{found['answers']} answers, {found['tokens']:,} tokens, {found['truncated']} of them cut "
        "at the length limit. [segments.md](../segments.md) says what this means.",
        "",
        "## Lengths, in tokens",
        "",
        "| cutoff | nats | segments | mean | 10 % | 25 % | 50 % | 75 % | 90 % | 99 % | longest |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["cutoffs"]:
        quantiles = " | ".join(f"{q:.0f}" for q in row["quantiles"])
        lines.append(
            f"| {row['name']} | {row['cutoff']:.3f} | {row['segments']:,} | {row['mean']:.1f} "
            f"| {quantiles} | {row['longest']} |"
        )
    everywhere = {"name": "every token", "places": found["everywhere"]}
    lines += ["", "## Share of the cuts that are where …", "", *_header("cuts at")]
    lines += [_row(row["name"], row["places"]) for row in [*found["cutoffs"], everywhere]]
    lines += ["", "## Share of such places that are cuts", "", *_header("cuts at")]
    for row in found["cutoffs"]:
        rate = (row["segments"] - found["answers"]) / found["places"]
        ratios = {name: rate * row["places"][name] / found["everywhere"][name] for name in PLACES}
        lines.append(_row(row["name"], {**ratios, "anywhere": rate}))
    lines += ["", "## The rules", ""]
    lines += [f"- {name}: `{pattern}`" for name, pattern in PLACES.items()]
    lines += [
        "",
        "## The first answers",
        "",
        "At the cutoff whose segments have 8 tokens on average.",
    ]
    for example in found["examples"]:
        asked = " ".join(example["prompt"].split())
        lines += ["", f"{example['label']}: *{asked.replace('*', chr(92) + '*')}*", "", "```text"]
        lines += [_wrapped(" ¦ ".join(example["segments"])), "```"]
    return "\n".join(lines)


def _header(first: str) -> list[str]:
    names = [*PLACES, "anywhere"]
    return [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]


def _row(name: str, shares: dict[str, float]) -> str:
    cells = [f"{100 * shares[place]:.1f} %" if place in shares else "" for place in PLACES]
    anywhere = shares.get("anywhere", 1.0)
    return f"| {name} | {' | '.join(cells)} | {100 * anywhere:.1f} % |"


def _wrapped(text: str) -> str:
    """A text for a code block, in lines that can be read."""
    return "\n".join(
        textwrap.fill(line, 110, drop_whitespace=False, break_long_words=False)
        for line in text.replace("```", "` ` `").split("\n")
    )


if __name__ == "__main__":
    main()
