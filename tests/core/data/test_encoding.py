from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from denserl_cli.core.chat.format import ChatFormat, encode_pair, encode_prompt
from denserl_cli.core.data.arrow_rows import PairRows, PromptRows
from denserl_cli.core.data.batches import EncodedPairRow
from denserl_cli.core.data.conversations import Pair, Prompt, read_pairs, read_prompts
from denserl_cli.core.data.encoding import encode_pairs, encode_prompts
from denserl_cli.core.data.splitting import split_pairs, split_prompts
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.schema import Source
from tests.core.fake_tokenizers import PLAIN, byte_tokenizer, ids
from tests.fakes import bot, user


def pair(prompt: str, chosen: str, rejected: str, origin: str = "here:1") -> Pair:
    return Pair([user(prompt), bot(chosen)], [user(prompt), bot(rejected)], None, origin)


def write(path: Path, rows: list[Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def good(count: int, name: str = "q") -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}", "chosen": "a", "rejected": "b"} for i in range(count)]


def questions(pairs: list[Pair]) -> list[str]:
    return [found.chosen[0]["content"] for found in pairs]


# reading


def test_usable_rows_are_read_and_the_others_listed_with_their_lines(tmp_path: Path) -> None:
    rows = [*good(2), {"prompt": "x", "chosen": "a"}, good(1)[0] | {"chosen": "b"}]
    source = write(tmp_path / "rows.jsonl", rows)
    found = read_pairs([source], seed=1)
    assert found.pairs == [pair(f"q{i}", "a", "b", f"{source.path}:{i + 1}") for i in range(2)]
    assert [skipped[:2] for skipped in found.skipped] == [
        (f"{source.path}:3", "no rejected"),
        (f"{source.path}:4", "identical answers"),
    ]


def test_a_broken_line_is_skipped_like_any_unusable_row(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", good(1))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": ')
    for found in (read_pairs([source], seed=1), read_prompts([source], seed=1)):
        assert len(found[0]) == 1
        assert [s[:2] for s in found.skipped] == [(f"{source.path}:2", "broken JSON")]


def test_strict_stops_at_unusable_rows_and_names_them(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*good(2), {}, {}])
    with pytest.raises(DenserlError, match=r"2 rows .*\n2 x no chosen: .*rows.jsonl:3"):
        read_pairs([source], seed=1, strict=True)
    with pytest.raises(DenserlError, match=r"2 x no prompt"):
        read_prompts([source], seed=1, strict=True)


@pytest.mark.parametrize("read", [read_pairs, read_prompts])
def test_data_without_a_usable_row_is_an_error(tmp_path: Path, read: Any) -> None:
    with pytest.raises(DenserlError, match=r"no usable row\n2 x no .*bad.jsonl:1, .*bad.jsonl:2"):
        read([write(tmp_path / "bad.jsonl", [{}, {}])], seed=1)
    with pytest.raises(DenserlError, match=r"no rows in .*empty.jsonl"):
        read([write(tmp_path / "empty.jsonl", [])], seed=1)


def test_weights_are_passes_over_a_source(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [*good(10), {}])

    def drawn(weight: float, seed: int = 1) -> list[str]:
        found = read_pairs([Source(str(path), weight=weight)], seed=seed)
        assert len(found.skipped) == 1
        return questions(found.pairs)

    everything = [f"q{i}" for i in range(10)]
    assert drawn(1) == everything
    assert drawn(2) == everything * 2
    half = drawn(0.5)
    assert len(half) == len(set(half)) == 5 and half == drawn(0.5) != drawn(0.5, seed=2)
    assert drawn(2.5)[:20] == everything * 2 and len(set(drawn(2.5)[20:])) == 5


def test_sources_are_mixed_in_their_order_and_drawn_independently(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", good(20, "a"))
    write(tmp_path / "b.jsonl", good(20, "b"))
    second = Source(str(tmp_path / "b.jsonl"), max_samples=4, weight=1.5)
    found = questions(read_pairs([first, second], seed=1).pairs)
    assert found[:20] == [f"a{i}" for i in range(20)]
    assert len(found) == 26 and len(set(found[20:])) == 4
    assert found == questions(read_pairs([first, second], seed=1).pairs)


def test_prompts_are_never_guessed_unless_the_source_says_so(tmp_path: Path) -> None:
    rows = [{"chosen": f"Say {i} a", "rejected": f"Say {i} b"} for i in range(3)]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DenserlError, match="3 x no prompt"):
        read_pairs([source], seed=1)
    found = read_pairs([replace(source, format="shared-beginning")], seed=1).pairs
    assert [(p.chosen[0]["content"], p.chosen[1]["content"]) for p in found] == [
        (f"Say {i}", "a") for i in range(3)
    ]


def test_columns_that_are_not_read_are_told_once(tmp_path: Path) -> None:
    rows = [{**row, "remark": "a long remark", "source": "some book"} for row in good(3)]
    heard: list[str] = []
    read_pairs([write(tmp_path / "rows.jsonl", rows)], seed=1, notice=heard.append)
    assert len(heard) == 1 and heard[0].startswith("column remark of 3 rows (the first: ")


def test_tools_are_ignored_with_one_notice(tmp_path: Path) -> None:
    rows = [{**row, "tools": [{"name": "f"}]} for row in good(3)]
    source = write(tmp_path / "rows.jsonl", [*good(1), *rows])
    for read in (read_pairs, read_prompts):
        heard: list[str] = []
        read([source], seed=1, notice=heard.append)
        assert len(heard) == 1 and "the tools of 3 rows (the first: " in heard[0]
        assert f"{source.path}:2" in heard[0]
        assert len(read([source], seed=1)[0]) == 4


def test_prompts_keep_their_other_columns_and_duplicates(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "level": 1}, {"prompt": "q", "level": 2}]
    source = write(tmp_path / "rows.jsonl", rows)
    found = read_prompts([source], seed=1).prompts
    assert [(p.messages, p.origin, p.row) for p in found] == [
        ([user("q")], f"{source.path}:{n}", {"level": n}) for n in (1, 2)
    ]


# encoding


def test_pairs_are_encoded_as_one_by_one_whatever_the_chunk() -> None:
    tokenizer = byte_tokenizer()
    pairs = [pair("q" * (i % 40), f"a{i}", "b" * (i % 7 + 1)) for i in range(600)]
    found = encode_pairs(ChatFormat.of(tokenizer), pairs, max_length=30, max_prompt_length=20)
    assert not found.skipped and len(found.rows) == 600
    cut = 0
    for one, row in zip(pairs, found.rows, strict=True):
        alone = encode_pair(
            tokenizer, one.chosen, one.rejected, max_length=30, max_prompt_length=20
        )
        assert [a.tolist() for a in (row.prompt, row.chosen, row.rejected)] == [*alone]
        assert row.prompt.dtype == row.chosen.dtype == row.rejected.dtype == np.int32
        whole = encode_pair(
            tokenizer, one.chosen, one.rejected, max_length=99, max_prompt_length=90
        )
        cut += whole != alone
    assert found.truncated == cut > 0


def test_pairs_that_the_template_cannot_write_are_skipped_by_reason() -> None:
    chat = ChatFormat.of(byte_tokenizer(PLAIN.replace("m.content", "m.content|replace('x', 'y')")))
    pairs = [pair("q", "a", "b", "f:1"), pair("q", "x", "b", "f:2"), pair("x", "a", "b", "f:3")]
    found = encode_pairs(chat, pairs, max_length=30, max_prompt_length=20)
    assert [row.origin for row in found.rows] == ["f:1"]
    assert [skipped[:2] for skipped in found.skipped] == [
        (origin, "the chat template rewrites the content") for origin in ("f:2", "f:3")
    ]
    with pytest.raises(DenserlError, match="2 x the chat template rewrites the content: f:2, f:3"):
        encode_pairs(chat, pairs, max_length=30, max_prompt_length=20, strict=True)
    with pytest.raises(DenserlError, match="no usable row"):
        encode_pairs(chat, pairs[1:], max_length=30, max_prompt_length=20)


def test_answers_that_are_identical_once_cut_are_skipped() -> None:
    chat = ChatFormat.of(byte_tokenizer())
    pairs = [pair("q", "same start, a", "same start, b"), pair("q", "a", "b")]
    found = encode_pairs(chat, pairs, max_length=12, max_prompt_length=5)
    assert [skipped.reason for skipped in found.skipped] == ["identical answers"]
    assert len(found.rows) == 1


def test_margins_and_origins_travel_with_their_pairs() -> None:
    one = Pair([user("q"), bot("a")], [user("q"), bot("b")], 0.5, "f:7")
    found = encode_pairs(
        ChatFormat.of(byte_tokenizer()), [one], max_length=30, max_prompt_length=20
    )
    assert (found.rows[0].margin, found.rows[0].origin) == (0.5, "f:7")


def test_long_prompts_keep_their_last_tokens_and_are_counted() -> None:
    tokenizer = byte_tokenizer()
    prompts = [Prompt([user("q" * n)], f"f:{n}", {"n": n}) for n in (1, 9)]
    found = encode_prompts(ChatFormat.of(tokenizer), prompts, 6)
    assert [p.ids.tolist() for p in found.prompts] == [
        encode_prompt(tokenizer, p.messages)[-6:] for p in prompts
    ]
    assert found.prompts[0].ids.tolist() == ids("<user>q<end>\n<bot>")[-6:]
    assert found.truncated == 1 and found.skipped == []
    assert [p.row["n"] for p in found.prompts] == [1, 9] and found.prompts[1].ids.dtype == np.int32


class Counter(Observer):
    def __init__(self) -> None:
        self.log: list[tuple[str, int | None]] = []

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        self.log.append((title, total))

    def advance(self, count: int = 1, **metrics: float) -> None:
        self.log.append(("advance", count))

    def end(self) -> None:
        self.log.append(("end", None))


def test_progress_is_reported_while_tokenising() -> None:
    counter = Counter()
    pairs = [pair(f"q{i}", "a", "b") for i in range(300)]
    chat = ChatFormat.of(byte_tokenizer())
    encode_pairs(chat, pairs, max_length=30, max_prompt_length=20, observer=counter)
    assert counter.log == [
        ("tokenise", 300), ("advance", 256), ("advance", 44), ("end", None)
    ]  # fmt: skip


# splitting


def rows(prompts: list[int]) -> PairRows:
    answer = np.array([1, 2], np.int32)
    return PairRows.of(
        EncodedPairRow(np.array([prompt], np.int32), answer, answer, None, f"f:{place}")
        for place, prompt in enumerate(prompts)
    )


def test_held_out_pairs_are_a_tenth_at_most() -> None:
    train, held = split_pairs(rows(list(range(100))), 7, seed=1)
    assert (len(train), len(held)) == (93, 7)
    train, held = split_pairs(rows(list(range(100))), 50, seed=1)
    assert (len(train), len(held)) == (90, 10)
    assert {row.origin for row in train} | {row.origin for row in held} == {
        f"f:{i}" for i in range(100)
    }
    assert not split_pairs(rows(list(range(9))), 5, seed=1)[1]
    assert not split_pairs(rows(list(range(100))), 0, seed=1)[1]


def test_the_split_follows_the_seed() -> None:
    def held(seed: int) -> list[str]:
        return [row.origin for row in split_pairs(rows(list(range(100))), 10, seed)[1]]

    assert held(1) == held(1) != held(2)


def test_pairs_of_one_prompt_stay_on_one_side() -> None:
    train, held = split_pairs(rows([i // 3 for i in range(300)]), 30, seed=1)
    assert len(held) == 30
    assert not {int(row.prompt[0]) for row in train} & {int(row.prompt[0]) for row in held}
    # one prompt that is larger than the tenth cannot be held out
    assert not split_pairs(rows([0] * 100), 10, seed=1)[1]


def test_a_prompt_that_was_cut_for_some_of_its_pairs_is_still_one_prompt() -> None:
    chat = ChatFormat.of(byte_tokenizer())
    pairs = [pair(f"prompt {i}", "a" * n, "b") for i in range(30) for n in (2, 20)]
    found = encode_pairs(chat, pairs, max_length=20, max_prompt_length=8)
    assert len({row.prompt.tobytes() for row in found.rows}) > 30
    train, held = split_pairs(PairRows.of(found.rows), 6, seed=1)
    assert len(held) == 6
    assert not {row.group for row in train} & {row.group for row in held}


def test_equal_prompts_stay_on_one_side() -> None:
    prompts = [Prompt([user("q")], f"f:{i}", {}, np.array([i // 2], np.int32)) for i in range(100)]
    train, held = split_prompts(PromptRows.of(prompts), 10, seed=1)
    assert (len(train), len(held)) == (90, 10)
    assert not {int(p.ids[0]) for p in train} & {int(p.ids[0]) for p in held}


# real data


def test_the_real_pairs_are_all_usable(shared: Path) -> None:
    source = Source(str(shared / "data" / "preferences" / "eval.jsonl"))
    found = read_pairs([source], seed=1)
    assert (len(found.pairs), found.skipped) == (600, [])
    assert len(read_prompts([source], seed=1).prompts) == 600
