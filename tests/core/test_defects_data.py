"""Defects of the authors' released code that concern tokens and data (method §7), by number."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from denserl_cli.core.chat.format import ChatFormat, encode_pair, encode_prompt
from denserl_cli.core.data.batches import collate_sides
from denserl_cli.core.data.conversations import Pair
from denserl_cli.core.data.encoding import encode_pairs
from denserl_cli.core.errors import DenserlError
from tests.core.fake_tokenizers import byte_tokenizer, ids
from tests.fakes import bot, user


def test_defect_4_masks_follow_lengths_where_pad_eos_and_terminator_are_one_token() -> None:
    tokenizer = byte_tokenizer(pad_token="<end>", eos_token="<end>")
    chat = ChatFormat.of(tokenizer)
    assert chat.pad_id == chat.terminator_id == tokenizer.eos_token_id
    long = [user("one"), bot("two"), user("three")]  # the prompt holds terminators itself
    pairs = [
        Pair([*long, bot("yes")], [*long, bot("n")], None, "f:1"),
        Pair([user("q"), bot("a")], [user("q"), bot("long answer")], None, "f:2"),
    ]
    rows = encode_pairs(chat, pairs, max_length=100, max_prompt_length=50).rows
    batch = collate_sides(rows, range(4), chat.pad_id)
    prompts = [
        ids("<user>one<end>\n<bot>two<end>\n<user>three<end>\n<bot>"),
        ids("<user>q<end>\n<bot>"),
    ]
    answers = [ids("yes<end>"), ids("a<end>"), ids("n<end>"), ids("long answer<end>")]
    for row, (prompt, answer) in enumerate(zip(prompts * 2, answers, strict=True)):
        sequence = prompt + answer
        assert batch.input_ids[row].tolist()[: len(sequence)] == sequence
        assert batch.responses[row][batch.response_mask[row]].tolist() == answer


MARKERS = "say <bot>\nhello<end>\n  and <user> too "


def test_defect_13_contents_survive_as_they_are() -> None:
    tokenizer = byte_tokenizer()
    chat = ChatFormat.of(tokenizer)
    response = chat.encode_response(MARKERS)
    assert tokenizer.decode(response[:-1]) == MARKERS
    assert set(response) & set(tokenizer.all_special_ids) <= {chat.terminator_id}
    prompt = chat.encode_prompt([user(MARKERS)])
    assert MARKERS in tokenizer.decode(prompt)


def test_defect_13_contents_survive_with_the_real_markers(shared: Path) -> None:
    phi3 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "phi3-mini")
    content = "  x <|assistant|>\ny<|endoftext|> z<|end|>\n"
    encoded = encode_pair(
        phi3,
        [user(content), bot(content)],
        [user(content), bot("x y")],
        max_length=200,
        max_prompt_length=100,
    )
    assert phi3.decode(encoded.chosen_ids[:-1]) == content
    assert content in phi3.decode(encoded.prompt_ids)
    assert encoded.chosen_ids != encoded.rejected_ids


@pytest.mark.parametrize("max_prompt_length", [12, 13, 0])
def test_defect_14_limits_under_which_an_answer_vanishes_are_an_error(
    max_prompt_length: int,
) -> None:
    tokenizer = byte_tokenizer()
    chosen, rejected = [user("a long question"), bot("a")], [user("a long question"), bot("b")]
    with pytest.raises(DenserlError, match="max_prompt_length"):
        encode_pair(tokenizer, chosen, rejected, max_length=12, max_prompt_length=max_prompt_length)
    with pytest.raises(DenserlError, match="max_prompt_length"):
        encode_pairs(
            ChatFormat.of(tokenizer),
            [Pair(chosen, rejected, None, "f:1")],
            max_length=12,
            max_prompt_length=max_prompt_length,
        )


def test_defect_14_the_tightest_allowed_limits_leave_every_answer_its_terminator() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode_pair(
        tokenizer,
        [user("a long question"), bot("long answer")],
        [user("a long question"), bot("b")],
        max_length=12,
        max_prompt_length=11,
    )
    assert (len(encoded.prompt_ids), encoded.chosen_ids) == (11, ids("<end>"))


def test_defect_16_the_start_of_a_llama31_prompt_is_kept_in_pairs(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama3.1")
    prompt = [{"role": "system", "content": "Rhyme."}, user("Hello")]
    encoded = encode_pair(
        tokenizer,
        [*prompt, bot("Mellow")],
        [*prompt, bot("Hi")],
        max_length=200,
        max_prompt_length=100,
    )
    text = str(tokenizer.decode(encoded.prompt_ids))
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>")
    assert "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nRhyme." in text
    # the very prompt that PPO samples from
    assert encoded.prompt_ids == encode_prompt(tokenizer, prompt)
