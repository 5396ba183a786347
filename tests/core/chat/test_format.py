from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from denserl_cli.core.chat.format import (
    ChatFormat,
    EncodedPair,
    encode_pair,
    encode_prompt,
    truncate_pair,
)
from denserl_cli.core.errors import DenserlError
from tests.core.fake_tokenizers import PLAIN, TRIMMING, byte_tokenizer, ids, load, word_tokenizer
from tests.fakes import bot, user

REAL = ("phi3-mini", "llama3", "llama3.1")


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


@pytest.fixture(params=REAL)
def real(request: pytest.FixtureRequest, shared: Path) -> PreTrainedTokenizerBase:
    return load(shared / "tokenizers" / request.param)


# formats that can be checked by hand


def test_a_prompt_ends_with_the_header_of_the_next_answer() -> None:
    messages = [system("be kind"), user("hi"), bot("yes?"), user("go")]
    expected = "<system>be kind<end>\n<user>hi<end>\n<bot>yes?<end>\n<user>go<end>\n<bot>"
    assert encode_prompt(byte_tokenizer(), messages) == ids(expected)


def test_a_trailing_answer_is_no_part_of_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    assert encode_prompt(tokenizer, [user("hi"), bot("yo")]) == encode_prompt(
        tokenizer, [user("hi")]
    )


def test_a_response_is_its_content_and_the_terminator_and_nothing_after_it() -> None:
    chat = ChatFormat.of(byte_tokenizer())
    assert chat.encode_response("yo") == ids("yo<end>")
    assert chat.encode_response("") == ids("<end>")


def test_contents_are_trimmed_exactly_where_the_template_trims() -> None:
    plain, trimming = ChatFormat.of(byte_tokenizer(PLAIN)), ChatFormat.of(byte_tokenizer(TRIMMING))
    assert plain.encode_response(" \n a ") == ids(" \n a <end>")
    assert trimming.encode_response(" \n a ") == ids("a<end>")
    left = ChatFormat.of(byte_tokenizer(PLAIN.replace("m.content", "m.content.lstrip()")))
    assert left.encode_prompt([user(" a ")]) == ids("<user>a <end>\n<bot>")


def test_control_tokens_typed_in_a_content_stay_text() -> None:
    tokenizer = byte_tokenizer()
    chat = ChatFormat.of(tokenizer)
    typed = chat.encode_response("a<end>b")
    assert typed == [*(i for c in "a<end>b" for i in ids(c)), *ids("<end>")]
    assert typed.count(chat.terminator_id) == 1
    assert chat.encode_prompt([user("<bot>")]).count(ids("<bot>")[0]) == 1
    # the tokenizer itself still reads control tokens
    assert tokenizer.encode("a<end>b") == ids("a<end>b")


def test_a_tokenizer_that_cannot_write_a_control_token_as_text_says_so() -> None:
    chat = ChatFormat.of(word_tokenizer())
    assert chat.encode_response("yes no") == [7, 8, 4]
    with pytest.raises(DenserlError, match="cannot write <end> as plain text"):
        chat.encode_response("yes <end> no")


def test_contents_may_be_moved_by_the_template() -> None:
    template = (
        "{% if messages[0].role == 'system' %}<user>{{ messages[1].content }} under "
        "{{ messages[0].content }}<end>{% for m in messages[2:] %}<bot>{{ m.content }}<end>"
        "{% endfor %}{% else %}{% for m in messages %}{{ '<bot>' if loop.index is even }}"
        "{{ m.content }}<end>{% endfor %}{% endif %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    messages = [system("rule"), user("hi")]
    assert encode_prompt(byte_tokenizer(template), messages) == ids("<user>hi under rule<end><bot>")


@pytest.mark.parametrize("change", ["m.content | replace('a', 'b')", "m.content[:30]"])
def test_a_template_that_rewrites_a_content_is_refused(change: str) -> None:
    chat = ChatFormat.of(byte_tokenizer(PLAIN.replace("m.content", change)))
    for encode in (chat.encode_response, lambda content: chat.encode_prompt([user(content)])):
        with pytest.raises(DenserlError, match="rewrites the content"):
            encode("an answer that is longer than thirty characters")


def test_a_template_that_only_touches_other_contents_is_used() -> None:
    chat = ChatFormat.of(byte_tokenizer(PLAIN.replace("m.content", "m.content|replace('a', 'b')")))
    assert chat.encode_response("xyz") == ids("xyz<end>")


def test_a_template_that_leaves_a_message_out_is_refused() -> None:
    template = PLAIN.replace(
        "{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}"
    )
    with pytest.raises(DenserlError, match="system"):
        encode_prompt(byte_tokenizer(template), [system("s"), user("u")])


def test_the_complaint_of_a_template_is_passed_on() -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    )
    with pytest.raises(DenserlError, match="no system here"):
        encode_prompt(byte_tokenizer(template + PLAIN), [system("s"), user("u")])


def test_other_keys_of_a_message_do_not_reach_the_template() -> None:
    template = PLAIN.replace("{{ m.content }}", "{{ 'x' if 'tool_calls' in m else m.content }}")
    message = {**user("hi"), "tool_calls": None}
    assert encode_prompt(byte_tokenizer(template), [message]) == ids("<user>hi<end>\n<bot>")


def test_a_date_in_the_prompt_is_fixed_unless_the_recipe_says_otherwise() -> None:
    template = "{{ date_string | default('today') }}" + PLAIN
    tokenizer = byte_tokenizer(template)
    assert encode_prompt(tokenizer, [user("u")])[:11] == ids("26 Jul 2024")
    other = ChatFormat.of(tokenizer, template_arguments={"date_string": "1 Jan"})
    assert other.encode_prompt([user("u")])[:5] == ids("1 Jan")


def test_the_terminator_comes_from_the_template_or_the_recipe() -> None:
    assert ChatFormat.of(byte_tokenizer()).terminator_id == ids("<end>")[0]
    tail = PLAIN.replace("<end>", ".<eos><end>")
    assert ChatFormat.of(byte_tokenizer(tail)).terminator_id == ids("<eos>")[0]
    # what the template writes between the content and the terminator belongs to the response
    assert ChatFormat.of(byte_tokenizer(tail)).encode_response("a") == ids("a.<eos>")
    later = ChatFormat.of(byte_tokenizer(tail), terminator="<end>")
    assert later.encode_response("a") == ids("a.<eos><end>")
    with pytest.raises(DenserlError, match="ends answers with '<eos>', not with '<user>'"):
        ChatFormat.of(byte_tokenizer(tail), terminator="<user>")
    # a template that ends no answer: the next turn's marker, or a token that it never writes
    open_ended = byte_tokenizer(PLAIN.replace("<end>", ""))
    for token in ("<user>", "<eos>"):
        assert ChatFormat.of(open_ended, token).encode_response("a")[-1] == ids(token)[0]
    with pytest.raises(DenserlError) as caught:
        ChatFormat.of(byte_tokenizer(PLAIN.replace("<end>", "")))
    assert caught.value.hint is not None
    assert "in chat.terminator, such as '<user>', which begins the next turn" in caught.value.hint


def test_stop_ids_are_the_terminator_then_eos_then_further_tokens_each_once() -> None:
    tokenizer = byte_tokenizer(eos_token="<eos>")
    chat = ChatFormat.of(tokenizer, stop_tokens=["<user>", "<end>"])
    assert list(chat.stop_ids) == ids("<end><eos><user>")
    assert list(ChatFormat.of(byte_tokenizer(eos_token="<end>")).stop_ids) == ids("<end>")
    assert list(ChatFormat.of(byte_tokenizer()).stop_ids) == ids("<end>")


@pytest.mark.parametrize("argument", [{"stop_tokens": ["<nix>"]}, {"terminator": "<nix>"}])
def test_an_unknown_token_is_named(argument: dict) -> None:
    for tokenizer in (byte_tokenizer(), byte_tokenizer(unk_token="<pad>")):
        with pytest.raises(DenserlError, match=f"chat.{next(iter(argument))}.*<nix>"):
            ChatFormat.of(tokenizer, **argument)


def test_the_pad_falls_back_to_eos_then_to_the_terminator() -> None:
    assert ChatFormat.of(byte_tokenizer(pad_token="<pad>", eos_token="<eos>")).pad_id == 256
    assert ChatFormat.of(byte_tokenizer(eos_token="<eos>")).pad_id == ids("<eos>")[0]
    assert ChatFormat.of(byte_tokenizer()).pad_id == ids("<end>")[0]


def test_a_tokenizer_without_chat_template_is_refused_with_a_hint() -> None:
    with pytest.raises(DenserlError, match="no chat template") as caught:
        encode_prompt(byte_tokenizer(None), [user("hi")])
    assert caught.value.hint


def test_a_changed_template_is_noticed() -> None:
    tokenizer = byte_tokenizer(PLAIN)
    assert encode_prompt(tokenizer, [user(" a")]) == ids("<user> a<end>\n<bot>")
    tokenizer.chat_template = TRIMMING
    assert encode_prompt(tokenizer, [user(" a")]) == ids("<user>a<end>\n<bot>")


@pytest.mark.parametrize("messages", [[], [bot("hi")]])
def test_a_prompt_needs_a_message_before_the_answer(messages: list[dict[str, str]]) -> None:
    with pytest.raises(DenserlError, match="no prompt"):
        encode_prompt(byte_tokenizer(), messages)


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": ["parts"]}, {}])
def test_a_message_needs_role_and_content(message: dict) -> None:
    with pytest.raises(DenserlError, match="a role and a content"):
        encode_prompt(byte_tokenizer(), [message])


def test_many_layouts_at_once_give_the_same_ids_as_one_by_one() -> None:
    chat = ChatFormat.of(byte_tokenizer())
    layouts = [chat.prompt_layout([user("a"), bot("b"), user("c")]), chat.response_layout("de")]
    assert chat.tokenize(layouts) == [chat.tokenize([one])[0] for one in layouts]
    assert [one.ids for one in chat.tokenize(layouts)] == [
        ids("<user>a<end>\n<bot>b<end>\n<user>c<end>\n<bot>"),
        ids("de<end>"),
    ]
    assert chat.tokenize([]) == []


# pairs and their truncation


def pair(prompt: int, chosen: int, rejected: int) -> EncodedPair:
    """Prompt tokens 1, 2, ..., response tokens from 101 and 201 on, terminator 9."""
    return EncodedPair(
        list(range(1, prompt + 1)),
        [*range(101, 100 + chosen), 9],
        [*range(201, 200 + rejected), 9],
    )


def test_a_pair_that_fits_is_left_alone() -> None:
    assert truncate_pair(pair(6, 4, 2), 10, 3, 9) == pair(6, 4, 2)


def test_a_prompt_keeps_its_last_tokens_when_the_longer_response_does_not_fit() -> None:
    assert truncate_pair(pair(6, 5, 2), 10, 3, 9) == ([4, 5, 6], [101, 102, 103, 104, 9], [201, 9])


def test_responses_are_cut_to_what_is_left_and_end_with_the_terminator() -> None:
    cut = truncate_pair(pair(6, 5, 2), 5, 3, 9)
    assert cut == ([4, 5, 6], [101, 9], [201, 9])
    # a short prompt leaves its room to the responses
    assert truncate_pair(pair(2, 7, 6), 6, 4, 9).chosen_ids == [101, 102, 103, 9]
    # and one token of room is the terminator's
    assert truncate_pair(pair(6, 5, 2), 4, 3, 9) == ([4, 5, 6], [9], [9])


def test_encode_pair_encodes_prompt_and_both_responses() -> None:
    chosen, rejected = [user("q"), bot("yes")], [user("q"), bot("n")]
    encoded = encode_pair(byte_tokenizer(), chosen, rejected, max_length=100, max_prompt_length=50)
    assert encoded == (ids("<user>q<end>\n<bot>"), ids("yes<end>"), ids("n<end>"))
    cut = encode_pair(byte_tokenizer(), chosen, rejected, max_length=5, max_prompt_length=2)
    assert cut == (ids("\n<bot>"), ids("ye<end>"), ids("n<end>"))


def test_encode_pair_refuses_sides_that_make_no_pair() -> None:
    def encode(chosen: list, rejected: list) -> None:
        encode_pair(byte_tokenizer(), chosen, rejected, max_length=9, max_prompt_length=4)

    with pytest.raises(DenserlError, match="prompts differ"):
        encode([user("a"), bot("x")], [user("b"), bot("y")])
    with pytest.raises(DenserlError, match="assistant turn"):
        encode([user("a"), bot("x")], [user("a")])
    with pytest.raises(DenserlError, match="assistant turn"):
        encode([], [user("a"), bot("x")])


# the real tokenizers

CONVERSATIONS = [
    [user("Who are you?")],
    [system("Answer briefly."), user("Why is the sky blue?")],
    [user("Hello"), bot("Hi! How can I help?"), user("Sing."), bot("La la."), user("Again 🎵")],
    [user("What does <|end|> or <|eot_id|> mean?\n<|user|>\n"), bot("a<|endoftext|>"), user("?")],
]
ANSWERS = [
    "I am a parser.",
    "two\n\nparagraphs with an emoji 🙂🙂",
    "  led by spaces and followed by them  ",
    "typed <|end|><|eot_id|> <|endoftext|> <|end_of_text|>\n",
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_pairs_of_real_tokenizers_hold_one_terminator_and_one_prompt(
    real: PreTrainedTokenizerBase, messages: list[dict[str, str]], answer: str
) -> None:
    chat = ChatFormat.of(real)
    encoded = encode_pair(
        real,
        [*messages, bot(answer)],
        [*messages, bot("no")],
        max_length=2048,
        max_prompt_length=1024,
    )
    assert encoded.prompt_ids == encode_prompt(real, messages) == chat.encode_prompt(messages)
    for response in (encoded.chosen_ids, encoded.rejected_ids):
        assert [place for place, i in enumerate(response) if i in chat.stop_ids] == [
            len(response) - 1
        ]
        assert not set(response[:-1]) & set(real.all_special_ids)
    text = real.decode(encoded.chosen_ids[:-1], clean_up_tokenization_spaces=False)
    if "trim" in real.chat_template:
        assert text == answer.strip()
    else:  # Phi-3's markers swallow the white space after them, as in apply_chat_template
        assert text == answer.lstrip()


@pytest.mark.parametrize("messages", CONVERSATIONS[:3])
def test_the_prompt_is_what_the_chat_template_writes(
    real: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> None:
    text = real.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encode_prompt(real, messages) == real.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "terminator", "stops", "pad"),
    [
        ("phi3-mini", 32007, (32007, 32000), 32000),
        ("llama3", 128009, (128009,), 128009),
        ("llama3.1", 128009, (128009,), 128004),
    ],
)
def test_published_terminators(
    shared: Path, name: str, terminator: int, stops: tuple[int, ...], pad: int
) -> None:
    chat = ChatFormat.of(load(shared / "tokenizers" / name))
    assert (chat.terminator_id, chat.stop_ids, chat.pad_id) == (terminator, stops, pad)
    assert chat.control.unwritable == () and chat.by_pieces


def test_published_stop_ids_of_llama31(shared: Path) -> None:
    tokenizer = load(shared / "tokenizers" / "llama3.1")
    chat = ChatFormat.of(tokenizer, stop_tokens=["<|end_of_text|>", "<|eom_id|>"])
    assert chat.stop_ids == (128009, 128001, 128008)


def test_real_pairs_read_as_the_whole_template_text(
    real: PreTrainedTokenizerBase, shared: Path
) -> None:
    chat = ChatFormat.of(real)
    with (shared / "data" / "preferences" / "eval.jsonl").open(encoding="utf-8") as file:
        conversations = [
            json.loads(line)["chosen"] for _, line in zip(range(60), file, strict=False)
        ]
    for messages in conversations:
        whole = real.encode(
            real.apply_chat_template(messages, tokenize=False), add_special_tokens=False
        )
        prompt, response = chat.encode_answer(messages)
        ours = prompt + response
        assert whole[: len(ours)] == ours
