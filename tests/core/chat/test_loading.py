"""Tokenizers and checkpoints that fit, and those that do not; padding and stop tokens of those."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.chat.loading import check_vocabulary, load_chat
from denserl_cli.core.data.batches import collate_sides
from denserl_cli.core.data.conversations import Pair
from denserl_cli.core.data.encoding import encode_pairs
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.planning.dry_run import chat_lines
from denserl_cli.core.ppo.rewards import replace_penalized
from denserl_cli.core.ppo.rollout import Collector
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import SegmentationConfig
from denserl_cli.core.sampling.base import Sampling
from denserl_cli.core.scoring.scorer import Scorer
from tests.core.fake_tokenizers import PLAIN, byte_tokenizer, ids, load, thinking_tokenizer
from tests.tiny import causal_lm, frozen, sampler, scalar_model


def checkpoint(folder: Path, rows: int) -> str:
    LlamaConfig(vocab_size=rows).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rows", [262, 263, 4096])
def test_a_model_may_have_more_embeddings_than_the_tokenizer_tokens(
    tmp_path: Path, rows: int
) -> None:
    check_vocabulary(ChatFormat.of(byte_tokenizer(eos_token="<eos>")), checkpoint(tmp_path, rows))


@pytest.mark.parametrize(
    ("chat", "rows", "beyond"),
    [
        # bytes are 0 to 255, the special tokens 256 to 261: <pad> <user> <system> <bot> <end> <eos>
        (ChatFormat.of(byte_tokenizer()), 200, "from 200 "),
        (ChatFormat.of(byte_tokenizer()), 260, r"1 of its ids, from 260 \('<end>'\)"),
        (ChatFormat.of(byte_tokenizer(eos_token="<eos>")), 261, r"from 261 \('<eos>'\)"),
        (ChatFormat.of(byte_tokenizer(pad_token="<eos>")), 261, r"from 261 \('<eos>'\)"),
        (ChatFormat.of(byte_tokenizer(), stop_tokens=["<eos>"]), 261, r"from 261 \('<eos>'\)"),
        (ChatFormat.of(byte_tokenizer("<eos>" + PLAIN)), 261, r"from 261 \('<eos>'\)"),
        # added tokens that are no special ones come out of any text
        (ChatFormat.of(thinking_tokenizer()), 262, r"2 of its ids, from 262 \('<think>'\)"),
    ],
)
def test_ids_beyond_the_embeddings_are_named(
    tmp_path: Path, chat: ChatFormat, rows: int, beyond: str
) -> None:
    with pytest.raises(DenserlError, match=beyond) as error:
        check_vocabulary(chat, checkpoint(tmp_path, rows))
    assert str(tmp_path) in error.value.message and f"beyond the {rows} emb" in error.value.message


def test_a_special_token_beyond_the_embeddings_that_nothing_uses_is_no_matter(
    tmp_path: Path,
) -> None:
    check_vocabulary(ChatFormat.of(byte_tokenizer()), checkpoint(tmp_path, 261))  # <eos> is 261


def test_a_checkpoint_without_configuration_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(DenserlError, match="cannot load the reward model"):
        check_vocabulary(ChatFormat.of(byte_tokenizer()), str(tmp_path), what="reward model")


def test_every_stage_looks_at_its_tokenizer_before_any_weights(tmp_path: Path) -> None:
    def chat(tokenizer: PreTrainedTokenizerBase, *settings: str) -> ChatFormat:
        shutil.rmtree(tmp_path / "words", ignore_errors=True)
        tokenizer.save_pretrained(tmp_path / "words")
        paths = [f"model.path={tmp_path}", f"model.tokenizer={tmp_path / 'words'}"]
        data = [f"data.{rows}=[{tmp_path / 'rows.jsonl'}]" for rows in ("preferences", "prompts")]
        made = load_recipe("sandbox-segment", ["sandbox=null", *paths, *data, *settings])
        return load_chat(made)[1]

    (tmp_path / "rows.jsonl").write_text("")
    checkpoint(tmp_path, 262)
    assert chat(byte_tokenizer(), "chat.prompt_ending=<bot>").terminator_id == 260
    with pytest.raises(DenserlError, match=r"chat\.prompt_ending: .*ends with '<end>.n<bot>', not"):
        chat(byte_tokenizer(), "chat.prompt_ending=<user>")
    with pytest.raises(DenserlError, match="'days', did you mean 'day'"):
        chat(byte_tokenizer(PLAIN + "{{ day }}"), "chat.template_arguments={days: x}")
    with pytest.raises(DenserlError, match=r"chat\.terminator: the tokenizer .* has no token '<no"):
        chat(byte_tokenizer(), "chat.terminator=<nowhere>")
    with pytest.raises(DenserlError, match="words has no chat template"):
        chat(byte_tokenizer(None))
    with pytest.raises(DenserlError, match="does not fit the starting model"):
        chat(thinking_tokenizer())


@pytest.mark.parametrize("other", ["terminator_id", "answer_beginning"])
def test_a_policy_that_begins_or_ends_answers_otherwise_meets_an_error(other: str) -> None:
    recipe = load_recipe("sandbox-segment", ["segmentation.cutoff=1.0"])
    chat = ChatFormat.of(thinking_tokenizer())
    record = RewardRecord.of(recipe, chat)
    assert record.answer_beginning == "<think>\n\n</think>\n\n"
    record.check_format(chat, "folder")
    changed = replace(record, **{other: 3 if other == "terminator_id" else "<think>"})
    with pytest.raises(DenserlError, match="reward model in folder was trained on with"):
        changed.check_format(chat, "folder")
    replace(record, **{other: None}).check_format(chat, "folder")  # nobody wrote it down


def test_a_dry_run_shows_how_prompts_end_and_answers_follow(tmp_path: Path) -> None:
    def lines() -> list[str]:
        return chat_lines(load_recipe("sandbox-segment", [f"model.path={tmp_path}"]))

    assert lines() == []  # there is no tokenizer yet
    thinking_tokenizer().save_pretrained(tmp_path)
    (line,) = lines()
    assert line.startswith("chat format: prompts end with '<end>\\n<bot><think>")
    assert line.endswith("with answers alone; answers end with '<end>'")


# padding

ANSWERS = ("Certainly, here are some words.", "No.")


def scores(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[torch.Tensor, ...]:
    """Segments and values of pairs of uneven length, padded as the tokenizer pads."""
    chat = ChatFormat.of(tokenizer)
    pairs = [
        Pair(*([{"role": "user", "content": q}, {"role": "assistant", "content": a}]
               for a in sides), None, q)
        for q, sides in (("Why?", ANSWERS), ("And what is the longer question?", ANSWERS[::-1]))
    ]  # fmt: skip
    encoded = encode_pairs(chat, pairs, max_length=200, max_prompt_length=100).rows
    batch = collate_sides(encoded, range(4), chat.pad_id)
    assert (batch.input_ids == chat.pad_id).sum() >= 20
    scorer = Scorer(
        SegmentationConfig(cutoff=9.0),
        reference=frozen(causal_lm(1, vocabulary=rows)),
        reward_model=frozen(scalar_model(2, vocabulary=rows)),
    )
    found = scorer(batch)
    assert found.entropy is not None and found.token_values is not None
    return found.ends, found.entropy, found.token_values


@pytest.mark.parametrize(
    ("name", "rows", "pads"),
    [
        ("phi3-mini", 32064, ("<|endoftext|>", "<|end|>", "<unk>")),
        ("llama3", 128256, (None, "<|reserved_special_token_0|>")),
    ],
)
def test_scores_do_not_depend_on_the_pad(
    shared: Path, name: str, rows: int, pads: tuple[str, ...]
) -> None:
    tokenizer = load(shared / "tokenizers" / name)
    found, own = [], tokenizer.pad_token
    for pad in pads:  # the eos or none at all, the terminator, a token for nothing else
        tokenizer.pad_token = pad
        found.append(scores(tokenizer, rows))
    tokenizer.pad_token = own
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


# several stop tokens


def test_any_stop_token_ends_a_response_and_belongs_to_no_segment() -> None:
    chat = ChatFormat.of(byte_tokenizer(eos_token="<eos>"), stop_tokens=["<user>", *"abcdefgh"])
    policy = causal_lm(0, vocabulary=262)
    collector = Collector(
        sampler=sampler(policy),
        policy=frozen(policy),
        scorer=Scorer(
            SegmentationConfig("token"),
            reference=None,
            reward_model=frozen(scalar_model(3, vocabulary=262)),
        ),
        sampling=Sampling(20, chat.stop_ids),
        micro_batch_size=24,
        pad_id=chat.pad_id,
    )
    prompts = [np.array(chat.encode_prompt([{"role": "user", "content": "xyz"}]), np.int32)] * 24
    rollout = collector.collect(prompts, [(0, 1, row, 0) for row in range(24)])
    last = [int(response[-1]) for response in rollout.responses]
    stopped = [token in chat.stop_ids for token in last]
    assert rollout.terminated.tolist() == stopped and 0 < sum(stopped) < 24
    assert {token for token, done in zip(last, stopped, strict=True) if done} - {chat.terminator_id}
    for row, (response, done) in enumerate(zip(rollout.responses, stopped, strict=True)):
        ends = len(response) - done if len(response) > 1 else 1
        assert rollout.ends[row].nonzero()[:, 0].tolist() == list(range(ends))
        assert not np.isin(response[:-1], chat.stop_ids).any()
    paid = replace_penalized(
        rollout.token_values, rollout.response_mask, rollout.terminated, missing_eos_penalty=-0.05
    )
    for row, done in enumerate(stopped):
        inside = paid[row][rollout.response_mask[row]]
        assert torch.equal(inside, rollout.token_values[row][rollout.response_mask[row]]) is done
        assert done or (inside == -0.05).all()


def test_the_terminator_is_one_of_the_stop_tokens_whatever_the_recipe_adds() -> None:
    open_ended = PLAIN.replace("<end>", "")
    for terminator, template in ((None, PLAIN), ("<end>", PLAIN), ("<eos>", open_ended)):
        tokenizer = byte_tokenizer(template, eos_token="<eos>")
        chat = ChatFormat.of(tokenizer, terminator, ["<user>"])
        assert chat.terminator_id == chat.stop_ids[0] == chat.encode_response("x")[-1]
        assert set(ids("<eos><user>")) <= set(chat.stop_ids)
