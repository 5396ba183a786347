"""What holds for every conversation and every tokenizer; conversations are drawn with a seed."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.chat.pairs import EncodedPair, truncate_pair
from denserl_cli.core.chat.template import plain_turns
from denserl_cli.core.data.conversations import Pair, Prompt
from denserl_cli.core.data.encoding import encode_pairs, encode_prompts
from tests.core.fake_tokenizers import (
    PLAIN,
    TRIMMING,
    byte_tokenizer,
    load,
    thinking_tokenizer,
)

Turns = list[dict[str, str]]

REAL = ("phi3-mini", "llama3", "llama3.1")
FAKES = {
    "plain": lambda: ChatFormat.of(byte_tokenizer(PLAIN)),
    "trimming": lambda: ChatFormat.of(byte_tokenizer(TRIMMING)),
    "thinking": lambda: ChatFormat.of(thinking_tokenizer()),
    "quiet": lambda: ChatFormat.of(
        thinking_tokenizer(), template_arguments={"enable_thinking": False}
    ),
}
FRAGMENTS = [
    "", " ", "\n", "\r\n", "\t", "\0", "\u00a0", "\u200b", "\ufeff", "word", " a b", "12,50 \u20ac",
    "na\u00efve", "nai\u0308ve", "\U0001f642", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u4f60\u597d", "\u0645\u0631\u062d\u0628\u0627", "<|end|>", "<|eot_id|>", "<|endoftext|>",
    "<|user|>\n", "<|assistant|>", "<s>", "<unk>", "<|begin_of_text|>", "<end>", "<bot>", "<pad>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|im_end|>", "[INST]",
    "{{ bos_token }}", "{% raw %}", "denserl0content", "denserl1content", "x" * 700,
]  # fmt: skip


def content(rng: random.Random) -> str:
    return "".join(rng.choices(FRAGMENTS, k=rng.randrange(6)))


def conversation(rng: random.Random) -> Turns:
    """Perhaps a system message, then one to three questions, answered but the last."""
    turns = [{"role": "system", "content": content(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(3)):
        turns += [{"role": role, "content": content(rng)} for role in ("user", "assistant")]
    return [*turns, {"role": "user", "content": content(rng)}]


@pytest.fixture(params=[*REAL, *FAKES])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    if request.param in FAKES:
        return FAKES[request.param]()
    shared: Path = request.getfixturevalue("shared")
    return ChatFormat.of(load(shared / "tokenizers" / request.param))


def tokens_in(chat: ChatFormat) -> tuple[PreTrainedTokenizerBase, set[int]]:
    tokenizer = chat.template.tokenizer
    return tokenizer, {*tokenizer.all_special_ids, *chat.stop_ids}


def test_contents_never_yield_control_tokens_and_the_terminator_is_last(chat: ChatFormat) -> None:
    rng = random.Random(1)
    _, control = tokens_in(chat)
    for _ in range(40):
        response = chat.encode_response(content(rng))
        assert [i for i in response if i in control] == [chat.terminator_id] == response[-1:]
        turns = conversation(rng)
        short = [{**turn, "content": turn["content"] and "x"} for turn in turns]
        typed, bare = chat.encode_prompt(turns), chat.encode_prompt(short)
        assert [i for i in typed if i in control] == [i for i in bare if i in control]


def test_what_is_tokenised_is_the_text_that_the_template_writes(chat: ChatFormat) -> None:
    rng = random.Random(2)
    for _ in range(40):
        turns = plain_turns(conversation(rng))
        layout = chat.prompt_layout(turns)
        text = chat.template.render(turns, True) + chat.answer.beginning
        assert "".join(part.text for part in layout.parts) == text
        # what a user typed is plain text wherever it has a control token in it
        typed = [turn["content"] for turn in turns if has_control(chat, turn["content"])]
        assert sum(part.plain for part in layout.parts) == (len(turns) if typed else 0)


def test_without_control_tokens_ids_are_those_of_apply_chat_template(chat: ChatFormat) -> None:
    rng = random.Random(6)
    compared = 0
    for _ in range(120):
        turns = [*conversation(rng), {"role": "assistant", "content": content(rng)}]
        if any(has_control(chat, turn["content"]) for turn in turns):
            continue
        prompt, response = chat.encode_answer(turns)
        whole = chat.template.ids([plain_turns(turns)], False)[0]
        assert [*prompt, *response] == whole[: len(prompt) + len(response)]
        assert response[-1] == chat.terminator_id
        assert prompt == chat.encode_prompt(turns)[: len(prompt)]
        if not chat.answer.beginning:
            asked = chat.template.ids([plain_turns(turns[:-1])], True)[0]
            assert chat.encode_prompt(turns) == asked
        compared += 1
    assert compared > 30


def has_control(chat: ChatFormat, content: str) -> bool:
    return chat.control.pattern.search(content) is not None


def test_what_a_byte_tokenizer_decodes_is_the_rendered_text() -> None:
    rng = random.Random(3)
    for make in FAKES.values():
        chat = make()
        for _ in range(40):
            turns, answer = conversation(rng), content(rng)
            decoded = chat.template.tokenizer.decode(chat.encode_prompt(turns))
            turns = plain_turns(turns)
            assert decoded == chat.template.render(turns, True) + chat.answer.beginning
            whole = [*turns, {"role": "assistant", "content": answer}]
            response = chat.template.tokenizer.decode(chat.encode_response(answer))
            assert response in chat.template.render(whole, False)


def test_one_conversation_has_one_prompt_however_it_is_asked_for(chat: ChatFormat) -> None:
    rng = random.Random(4)
    conversations = [conversation(rng) for _ in range(30)]
    prompts = encode_prompts(
        chat, [Prompt(turns, str(i), {}) for i, turns in enumerate(conversations)], 10_000
    ).prompts
    sides = [
        [[*turns, {"role": "assistant", "content": answer}] for answer in ("yes", "no ...")]
        for turns in conversations
    ]
    pairs = encode_pairs(
        chat,
        [Pair(*pair, None, str(i)) for i, pair in enumerate(sides)],
        max_length=10_000,
        max_prompt_length=9_000,
    ).rows
    assert len(prompts) == len(pairs) == 30
    for turns, prompt, pair in zip(conversations, prompts, pairs, strict=True):
        assert prompt.ids.tolist() == pair.prompt.tolist() == chat.encode_prompt(turns)
        assert pair.chosen.tolist() == chat.encode_response("yes")


@pytest.mark.parametrize("name", REAL)
def test_real_pairs_have_one_prompt_in_reward_modelling_and_in_ppo(shared: Path, name: str) -> None:
    chat = ChatFormat.of(load(shared / "tokenizers" / name))
    with (shared / "data" / "preferences" / "eval.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(80), file, strict=False)]
    for before in (rows, [joined(*two) for two in zip(rows[::2], rows[1::2], strict=True)]):
        pairs = [Pair(r["chosen"], r["rejected"], None, str(i)) for i, r in enumerate(before)]
        asked = [Prompt(r["chosen"], str(i), {}) for i, r in enumerate(before)]
        encoded = encode_pairs(chat, pairs, max_length=2048, max_prompt_length=1024)
        prompts = encode_prompts(chat, asked, 1024)
        assert not encoded.skipped and not prompts.skipped
        by_origin = {prompt.origin: prompt.ids for prompt in prompts.prompts}
        for row in encoded.rows:
            assert np.array_equal(row.prompt[-1024:], by_origin[row.origin])
            for response in (row.chosen, row.rejected):
                assert np.flatnonzero(np.isin(response, chat.stop_ids)).tolist() == [
                    len(response) - 1
                ]


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two questions in one conversation."""
    return {side: first["chosen"] + second[side] for side in ("chosen", "rejected")}


# truncation (method section 3)


def test_truncation_holds_its_limits_at_every_length() -> None:
    rng = random.Random(5)
    edges = {"as it is": 0, "prompt": 0, "responses": 0}
    for _ in range(4000):
        prompt = list(range(100, 100 + rng.randrange(1, 12)))
        chosen, rejected = ([*range(200, 200 + rng.randrange(9)), 9] for _ in "cr")
        max_prompt_length = rng.randrange(1, 10)
        max_length = max_prompt_length + rng.randrange(1, 10)
        pair = EncodedPair(prompt, chosen, rejected)
        cut = truncate_pair(pair, max_length, max_prompt_length, 9)
        longest = max(len(chosen), len(rejected))
        if len(prompt) + longest <= max_length:
            assert cut == pair
            edges["as it is"] += len(prompt) + longest == max_length
            continue
        assert cut.prompt_ids == prompt[-max_prompt_length:]
        room = max_length - len(cut.prompt_ids)
        edges["prompt"] += room == longest
        for whole, part in ((chosen, cut.chosen_ids), (rejected, cut.rejected_ids)):
            assert len(part) == min(len(whole), room) and part[-1] == 9
            assert part[:-1] == whole[: len(part) - 1]
            edges["responses"] += len(whole) == room + 1
    assert min(edges.values()) > 50  # every boundary was met
