"""Where answers stand: kinds of template and of tokenizer, each held against its own ids."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from denserl_cli.core.chat import encode_pair, encode_prompt
from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.errors import DenserlError
from tests.core.fake_tokenizers import (
    PLAIN,
    blank_tokenizer,
    byte_tokenizer,
    ids,
    load,
    thinking_tokenizer,
    word_tokenizer,
)

Turns = list[dict[str, str]]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    LLAMA_2.replace("bos_token + ", "").replace(" + ' ' + eos", " + eos").replace(".strip()", "")
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
    "{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHANNEL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot><system>final<user>{{ m.content }}"
    "<end>{% else %}{{ '<' + m.role + '>' + m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
"""What gpt-oss does: a channel's name between the header and the answer."""
OPEN_THOUGHT = PLAIN.replace(
    "%}<bot>{% endif", "%}<bot>{{ '' if quiet is defined and quiet else '<think>' }}{% endif"
)
"""What DeepSeek-R1 does: prompts begin a thought that whole conversations have not."""

CONTENTS = [
    "What is it", "Four.", " led by a blank", "\nled by a line break", "ends in one \n", "", "  ",
    "two\n\nlines, naïve 你好 🙂", "Yes", '"No"', "- I\n- A",
]  # fmt: skip

BLANKS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    f"{name} {prefix}": lambda template=template, prefix=prefix: blank_tokenizer(template, prefix)
    for name, template in {
        "llama-2": LLAMA_2,
        "mistral": MISTRAL,
        "vicuna": VICUNA,
        "zephyr": ZEPHYR,
    }.items()
    for prefix in ("first", "always", "legacy")
}


def check_ids(tokenizer: PreTrainedTokenizerBase, **arguments: object) -> int:
    """Hold pairs against `apply_chat_template`; returns how many were not refused."""
    chat, equal = ChatFormat.of(tokenizer, template_arguments=arguments), 0
    for place, content in enumerate(CONTENTS):
        for shift in (0, 2, 7):
            answer = CONTENTS[(place + shift) % len(CONTENTS)]
            turns = [user(content), bot(CONTENTS[place - 1]), user("What"), bot(answer)]
            for whole in (turns[:1] + turns[3:], turns):
                with suppress(DenserlError):  # a row may be refused
                    prompt, response = chat.encode_answer(whole)
                    found = [*prompt, *response]
                    expected = tokenizer.apply_chat_template(whole, return_dict=False, **arguments)
                    assert found == expected[: len(found)], whole
                    assert response[-1] == chat.terminator_id
                    asked = chat.encode_prompt(whole)
                    assert prompt == asked[: len(prompt)]
                    asking = tokenizer.apply_chat_template(
                        whole[:-1], add_generation_prompt=True, return_dict=False, **arguments
                    )
                    assert chat.answer.beginning or asked == asking
                    equal += 1
    return equal


@pytest.mark.parametrize("name", BLANKS)
def test_tokenizers_that_put_blanks_before_words(name: str) -> None:
    assert check_ids(BLANKS[name]()) > 40


@pytest.mark.parametrize("name", ["phi3-mini", "llama3", "llama3.1"])
@pytest.mark.parametrize("template", [LLAMA_2, MISTRAL, VICUNA, ZEPHYR, None])
def test_real_tokenizers(shared: Path, name: str, template: str | None) -> None:
    tokenizer = load(shared / "tokenizers" / name)
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = template or own
        assert check_ids(tokenizer) > 40
    finally:
        tokenizer.chat_template = own


def test_a_blank_before_the_first_word_is_left_to_the_answer() -> None:
    tokenizer = blank_tokenizer(MISTRAL)
    chat = ChatFormat.of(tokenizer)
    assert (chat.answer.beginning, chat.answer.lead) == ("", " ")
    prompt, response = chat.encode_answer([user("What"), bot("Four")])
    assert tokenizer.convert_ids_to_tokens(response) == ["▁Four", "</s>"]
    assert tokenizer.convert_ids_to_tokens(prompt) == ["▁[INST]", "▁What", "▁[/INST]"]


def test_a_channel_before_the_answer_belongs_to_the_prompt() -> None:
    tokenizer = byte_tokenizer(CHANNEL)
    chat = ChatFormat.of(tokenizer)
    assert chat.answer.beginning == "<system>final<user>"
    prompt = ids("<user>hi<end><bot><system>final<user>")
    assert encode_prompt(tokenizer, [user("hi")]) == prompt
    pair = encode_pair(
        tokenizer,
        [user("hi"), bot("yo")],
        [user("hi"), bot("no")],
        max_length=99,
        max_prompt_length=50,
    )
    assert pair == (prompt, ids("yo<end>"), ids("no<end>"))
    assert check_ids(tokenizer) > 40
    assert "of which the template writes '<system>final<user>' with answers alone" in str(chat)


def test_an_answer_inside_a_thought_that_the_prompt_has_opened_is_closed_by_the_template() -> None:
    opened = PLAIN.replace("'<bot>' if m", "'<bot><think></think>' if m")
    opened = opened.replace("%}<bot>", "%}<bot><think>")
    chat = ChatFormat.of(byte_tokenizer(opened))
    assert chat.answer.beginning == "</think>"
    assert chat.encode_prompt([user("q")]) == ids("<user>q<end>\n<bot><think></think>")


def test_a_prompt_that_contradicts_the_whole_is_refused_with_what_makes_them_agree() -> None:
    tokenizer = byte_tokenizer(OPEN_THOUGHT)
    with pytest.raises(DenserlError, match="contradicts itself") as caught:
        encode_prompt(tokenizer, [user("q")])
    assert "<bot><think>'" in caught.value.message
    assert "<bot><answer><end>" in caught.value.message
    assert caught.value.hint == "set chat.template_arguments: {quiet: true}, then the two agree"
    assert check_ids(tokenizer, quiet=True) > 40
    hopeless = byte_tokenizer(OPEN_THOUGHT.replace("if quiet is defined and quiet", "if false"))
    with pytest.raises(DenserlError, match="contradicts itself") as caught:
        encode_prompt(hopeless, [user("q")])
    assert caught.value.hint is not None
    assert "no argument of the template makes the two agree" in caught.value.hint


def test_rows_of_a_kind_that_the_template_contradicts_are_refused_and_others_are_not() -> None:
    # as Mistral's: the system message stands in the last message, where that is a question
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '<bot>' if m.role == 'assistant' else "
        "'<user>' }}{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% endif %}{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    chat = ChatFormat.of(byte_tokenizer(template))
    assert chat.encode_answer([user("q"), bot("a")]) == (ids("<user>q<end><bot>"), ids("a<end>"))
    for ask in (chat.encode_answer, lambda turns: chat.encode_prompt(turns[:-1])):
        with pytest.raises(DenserlError, match="contradicts itself: a prompt of system, user"):
            ask([system("s"), user("q"), bot("a")])


def test_a_prompt_whose_end_changes_before_a_word_is_refused() -> None:
    template = VICUNA.replace("ASSISTANT:{%", "ASSISTANT: {%")
    with pytest.raises(DenserlError, match="other tokens when an answer follows") as caught:
        encode_prompt(blank_tokenizer(template), [user("q")])
    assert caught.value.hint is not None and "without white space at the end" in caught.value.hint


def test_one_token_of_prompt_and_answer_belongs_to_the_answer(shared: Path) -> None:
    """A line break after a header's: Llama 3 has a token for three of them."""
    tokenizer = load(shared / "tokenizers" / "llama3")
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = own.replace("| trim", "")
        chosen, rejected = [user("q"), bot("\nyes")], [user("q"), bot("no")]
        limits = {"max_length": 99, "max_prompt_length": 50}
        pair = encode_pair(tokenizer, chosen, rejected, **limits)
        asked = encode_prompt(tokenizer, chosen)
        assert asked == [*pair.prompt_ids, *tokenizer.encode("\n\n", add_special_tokens=False)]
        for side, response in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
            whole = tokenizer.apply_chat_template(side, return_dict=False)
            assert pair.prompt_ids + response == whole[: len(pair.prompt_ids + response)]
        assert tokenizer.decode(pair.rejected_ids) == "\n\nno<|eot_id|>"
    finally:
        tokenizer.chat_template = own


@pytest.mark.parametrize("prefix", ["first", "always"])
def test_control_tokens_in_a_content_are_text_or_the_row_is_refused(prefix: str) -> None:
    chat = ChatFormat.of(blank_tokenizer(MISTRAL, prefix))
    assert not chat.by_pieces  # "Four" alone has no blank before it, or one too many
    for turns in ([user("What is </s>"), bot("A")], [user("What"), bot("a </s>")]):
        with pytest.raises(DenserlError, match="cannot write </s> as plain text without tokens"):
            chat.encode_answer(turns)
    plain = ChatFormat.of(byte_tokenizer())
    typed = plain.encode_answer([user("a <end>"), bot("b <bot>")])
    assert [one.count(plain.terminator_id) for one in typed] == [1, 1]


def test_an_empty_system_message_is_none() -> None:
    tokenizer = byte_tokenizer(
        "{% if messages[0].role != 'system' %}<system>be<end>{% endif %}" + PLAIN
    )
    turns = [user("q"), bot("a")]
    assert encode_prompt(tokenizer, [system(""), *turns]) == encode_prompt(tokenizer, turns)
    limits = {"max_length": 99, "max_prompt_length": 50}
    pair = encode_pair(tokenizer, [system(""), *turns], [user("q"), bot("b")], **limits)
    assert pair.prompt_ids == ids("<system>be<end><user>q<end>\n<bot>")


@pytest.mark.parametrize(
    ("template", "message", "hint"),
    [
        (PLAIN + "{{ tools | length }}", "needs tools", "model.tokenizer"),
        (PLAIN + "{{ documents[0].title }}", "needs documents", "model.tokenizer"),
        ("{{ bos_token + '' }}" + PLAIN, "needs bos_token", "chat.template_arguments: {bos_token"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content[0].text }}"), "lists of parts", "model."),
        (PLAIN.replace("m.content", "m.content + m.content"), "user messages just once", "model."),
        ("{{ raise_exception('no') }}", "refuses the conversation: no", "model.tokenizer"),
    ],
)
def test_templates_that_cannot_write_a_question_and_its_answer(
    template: str, message: str, hint: str
) -> None:
    with pytest.raises(DenserlError, match=message) as caught:
        encode_prompt(byte_tokenizer(template), [user("q")])
    assert "the chat template of" in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint


def test_a_template_that_begins_with_a_system_message_needs_one() -> None:
    demands = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat = ChatFormat.of(byte_tokenizer(demands + PLAIN))
    prompt, response = chat.encode_answer([system("s"), user("q"), bot("a")])
    assert (prompt, response) == (ids("<system>s<end>\n<user>q<end>\n<bot>"), ids("a<end>"))
    with pytest.raises(DenserlError, match="no system"):
        chat.encode_prompt([user("q")])


def test_a_tokenizer_without_templates_by_design_is_named() -> None:
    class MistralCommonBackend:
        name_or_path = "org/model"

    with pytest.raises(DenserlError, match="org/model is a MistralCommonBackend") as caught:
        encode_prompt(MistralCommonBackend(), [user("q")])  # type: ignore[arg-type]
    assert caught.value.hint is not None and "uninstall mistral-common" in caught.value.hint


def test_a_tokenizer_with_ids_of_its_own_for_conversations_is_refused() -> None:
    class Odd(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args: object, tokenize: bool = True, **kwargs: object):  # type: ignore[no-untyped-def,override]
            found = super().apply_chat_template(*args, tokenize=tokenize, **kwargs)  # type: ignore[arg-type]
            return [[7, *ids] for ids in found] if tokenize else found

    plain = byte_tokenizer()
    odd = Odd(tokenizer_object=plain.backend_tokenizer, chat_template=PLAIN)
    with pytest.raises(DenserlError, match="apply_chat_template gives other ids"):
        ChatFormat.of(odd)


def test_formats_of_the_other_tests_are_exact() -> None:
    assert check_ids(thinking_tokenizer(), enable_thinking=False) > 40
    assert check_ids(byte_tokenizer()) > 40
    assert ChatFormat.of(word_tokenizer()).by_pieces
