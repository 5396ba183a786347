"""Memory and speed of preference data: tokenised into the cache, and started from it.

    python benchmarks/data.py [--quick] [--pairs N ...] [--tokenizer FOLDER] [--folder FOLDER]

Writes synthetic pairs, 1,000 to 700,000 of them, the last with short texts so that time and disk
stay bounded. For each size a process of its own tokenises them (`build`), another one starts from
the cache, splits them and makes the batches of some steps (`start`), and for small sizes a third
one keeps everything in Python lists (`lists`). Prints a Markdown table. Memory is what a process
holds of its own (RssAnon) at its peak, above what it had with libraries and tokenizer loaded; the
pages of mapped files, which the system may drop at any time, are shown apart.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT.parent / "shared" / "tokenizers" / "llama3.1"
LONG, SHORT = (120, 180), (6, 10)
"""Mean words of a prompt and of a response."""
SIZES = {1_000: LONG, 10_000: LONG, 100_000: SHORT, 700_000: SHORT}
QUICK = {500: LONG, 2_000: LONG, 4_000: SHORT}
LISTS_UP_TO = 10_000
TEXTS = 2_000
"""Different prompts and answers, which are put together anew for each pair."""
STEPS, BATCH, MICRO = 50, 128, 8
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


class Memory(NamedTuple):
    """MiB of a process: its own, and mapped from files."""

    own: float
    mapped: float


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute")
    parser.add_argument("--pairs", nargs="+", type=int, choices=SIZES, help="these sizes alone")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--folder", type=Path, help="where data and cache are put for the while")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        kind, file, tokenizer = arguments.case
        print(json.dumps(work(kind, file, tokenizer)))
        return
    print(versions())
    print("| pairs | tokens a pair | what | seconds | pairs/s | own memory, MiB | mapped, MiB |")
    print("|---:|---:|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        tokenizer = arguments.tokenizer
        if not tokenizer.is_dir():
            tokenizer = make_tokenizer(Path(place) / "tokenizer")
        sizes = QUICK if arguments.quick else SIZES
        for pairs in arguments.pairs or sizes:
            measure(Path(place), tokenizer, pairs, (SIZES | sizes)[pairs])


def measure(place: Path, tokenizer: Path, pairs: int, words: tuple[int, int]) -> None:
    """Print the rows of one size."""
    file, cache = place / "pairs.jsonl", place / "cache"
    write_pairs(file, pairs, words)
    for kind in ("build", "start", *(["lists"] if pairs <= LISTS_UP_TO else [])):
        found = json.loads(
            subprocess.run(
                [sys.executable, __file__, "--case", kind, str(file), str(tokenizer)],
                check=True,
                stdout=subprocess.PIPE,
                env={**os.environ, "DENSERL_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
            ).stdout
        )
        cells = [f"{pairs:,}", f"{found['tokens']:.0f}", kind, f"{found['seconds']:.1f}"]
        rate = "" if kind == "start" else f"{pairs / found['seconds']:,.0f}"
        memory = [f"{found[name]:.0f}" for name in ("own", "mapped")]
        print(f"| {' | '.join([*cells, rate, *memory])} |", flush=True)
    file.unlink()
    shutil.rmtree(cache)


def work(kind: str, file: str, tokenizer: str) -> dict[str, float]:
    """One case, in a process of its own."""
    from transformers import AutoTokenizer

    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.data import batches, mixture
    from denserl_cli.core.data.arrow_rows import PairRows, pair_lengths, sequences_of
    from denserl_cli.core.data.conversations import read_pairs
    from denserl_cli.core.data.encoding import PairEncoding, encode_pairs
    from denserl_cli.core.data.splitting import split_pairs
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Source

    chat = ChatFormat.of(AutoTokenizer.from_pretrained(tokenizer))
    sources = [Source(file)]
    ctypes.CDLL(None).malloc_trim(0)  # or what loading has freed would be used again, uncounted
    before, began = memory(), time.perf_counter()
    with watched() as peak:
        if kind == "lists":
            pairs = read_pairs(sources, seed=1).pairs
            limits = {"max_length": 2048, "max_prompt_length": 1728}
            rows: Any = PairRows.of(encode_pairs(chat, pairs, **limits).rows[:1000])
        else:
            encoding = PairEncoding(chat, 2048, 1728)
            mixed = mixture.mixed(encoding, sources, seed=1, strict=False, observer=Observer())
            rows = mixed.rows
        if kind == "start":
            train, _ = split_pairs(rows, 2000, 42)
            sides = sequences_of(train).lengths.reshape(2, -1)
            size = min(BATCH, len(train))
            steps = min(STEPS, len(train) // size)
            for indices in batches.global_batches(len(train), size, steps=steps, seed=1):
                for part in batches.pair_batches(sides[:, indices].sum(0), indices, MICRO):
                    lengths, rows_of_part = sides[:, part].ravel(), [train[i] for i in part]
                    for numbers in batches.forward_passes(lengths):
                        batches.collate_sides(rows_of_part, numbers, chat.pad_id)
        seconds = time.perf_counter() - began
    tokens = float(pair_lengths(rows).sum(1).mean())
    own, mapped = (high - low for high, low in zip(peak[0], before, strict=True))
    return {"seconds": seconds, "tokens": tokens, "own": own, "mapped": mapped}


def memory() -> Memory:
    """What this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return Memory(*(int(found[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")))


@contextmanager
def watched() -> Iterator[list[Memory]]:
    """The highest figures of the while, looked at every 20 ms."""
    peak, done = [memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = Memory(*map(max, peak[0], memory()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def write_pairs(file: Path, pairs: int, words: tuple[int, int]) -> None:
    """Pairs of random words; lengths are log-normal, as real ones are, and every prompt is new."""
    rng = np.random.default_rng(0)
    stock = vocabulary()

    def texts(mean: int) -> list[str]:
        lengths = np.maximum(1, rng.lognormal(np.log(mean), 0.6, TEXTS)).astype(int)
        return [" ".join(rng.choice(stock, length)) for length in lengths]

    prompts, answers = map(texts, words)
    with file.open("w") as out:
        for number in range(pairs):
            prompt, chosen, rejected = rng.integers(TEXTS, size=3)
            row = {"prompt": f"{number}: {prompts[prompt]}"}
            row |= {"chosen": answers[chosen], "rejected": answers[rejected]}
            out.write(json.dumps(row) + "\n")


def vocabulary() -> np.ndarray:
    """Words of the licence and the documentation of this repository."""
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    return np.array(sorted({word for text in texts for word in text.split() if word.isalpha()}))


def make_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer with a chat template, trained on the words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(vocabulary())], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=TEMPLATE, eos_token="<|end|>"
    )
    made.save_pretrained(folder)
    return folder


def versions() -> str:
    """Where and with what the numbers were made."""
    import platform

    import pyarrow
    import tokenizers
    import transformers

    libraries = (pyarrow, tokenizers, transformers)
    named = ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    return f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {named}\n"


if __name__ == "__main__":
    main()
