"""Templates that think, name the day, take arguments or rewrite what they are given."""

from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.errors import DenserlError
from tests.core.fake_tokenizers import PLAIN, byte_tokenizer, load, thinking_tokenizer
from tests.fakes import bot, user

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
QUIET = {"enable_thinking": False}


@pytest.fixture
def on_another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 12, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)


# thoughts


def test_thinking_is_switched_off_in_the_prompt_and_leaves_the_answer_alone() -> None:
    tokenizer = thinking_tokenizer()
    quiet = ChatFormat.of(tokenizer, template_arguments=QUIET, prompt_ending=EMPTY_THOUGHT)
    assert quiet.encode_prompt([user("hi")]) == tokenizer.encode(
        "<user>hi<end>\n<bot>" + EMPTY_THOUGHT
    )
    assert quiet.encode_response("yo") == tokenizer.encode("yo<end>")
    # and prompt and response together are what the template writes for the whole conversation
    whole = tokenizer.apply_chat_template([user("hi"), bot("yo")], tokenize=False, **QUIET)
    together = quiet.encode_prompt([user("hi")]) + quiet.encode_response("yo")
    assert tokenizer.encode(whole)[: len(together)] == together


def test_an_empty_thought_that_the_template_writes_belongs_to_the_prompt() -> None:
    tokenizer = thinking_tokenizer()
    loud = ChatFormat.of(tokenizer, prompt_ending="<bot>" + EMPTY_THOUGHT)
    assert (loud.answer.beginning, loud.answer.lead) == (EMPTY_THOUGHT, "")
    quiet = ChatFormat.of(tokenizer, template_arguments=QUIET)
    assert (quiet.answer.beginning, quiet.answer.lead) == ("", "")
    for turns in ([user("hi")], [user("hi"), bot("yo"), user("why?")]):
        assert loud.encode_prompt(turns) == quiet.encode_prompt(turns)
        whole = tokenizer.apply_chat_template([*turns, bot("so")], return_dict=False)
        prompt, response = loud.encode_answer([*turns, bot("so")])
        assert [*prompt, *response, *tokenizer.encode("\n")] == whole


def test_earlier_answers_lose_their_thoughts_and_nothing_else() -> None:
    tokenizer = thinking_tokenizer()
    chat = ChatFormat.of(tokenizer, template_arguments=QUIET)
    thoughtful = [user("a"), bot("<think>\nhm\n</think>\n\n b <end>"), user("c")]
    plain = [user("a"), bot(" b <end>"), user("c")]
    expected = chat.encode_prompt(plain)
    assert chat.encode_prompt(thoughtful) == expected
    # the end that the answer only mentions is still text
    assert expected.count(chat.terminator_id) == 3
    # the pair's prompt is the same one
    sides = [[*thoughtful, bot(answer)] for answer in ("x", "y")]
    assert chat.tokenize(chat.pair_layouts(*sides))[0].ids == expected


def test_thoughts_in_the_last_answer_are_refused_clearly() -> None:
    chat = ChatFormat.of(thinking_tokenizer(), template_arguments=QUIET)
    with pytest.raises(DenserlError, match="rewrites the content") as error:
        chat.encode_response("<think>\nhm\n</think>\n\nyes")
    assert error.value.hint and error.value.hint.startswith("of a message of the assistant")


def test_white_space_that_a_template_trims_in_part_is_gone_from_the_answer() -> None:
    chat = ChatFormat.of(thinking_tokenizer(), template_arguments=QUIET)
    tokenizer = chat.template.tokenizer
    assert chat.encode_response("\n\n yes \n") == tokenizer.encode(" yes \n<end>")
    assert chat.encode_response("\n") == tokenizer.encode("<end>")


def test_the_user_keeps_what_only_looks_like_thoughts() -> None:
    chat = ChatFormat.of(thinking_tokenizer())
    assert chat.template.fill([user("</think> x")], generation_prompt=True)[1] == ["</think> x"]


def test_markers_that_the_template_writes_are_control_tokens_flagged_or_not() -> None:
    tokenizer = thinking_tokenizer()
    quiet = ChatFormat.of(tokenizer, template_arguments=QUIET)
    assert quiet.control.unwritable == ("<think>", "</think>")
    tokenizer.chat_template = PLAIN  # which writes none of them
    assert ChatFormat.of(tokenizer).control.unwritable == ()
    with pytest.raises(DenserlError, match="cannot write <think> as plain text"):
        quiet.encode_prompt([user("what is <think>?")])


@pytest.mark.parametrize("change", ["split('#')[-1]", "split('#')[0]", "replace('#', '')"])
def test_earlier_answers_may_lose_their_beginning_alone(change: str) -> None:
    chat = ChatFormat.of(byte_tokenizer(PLAIN.replace("m.content", f"m.content.{change}")))
    messages = [user("q"), bot("some#answer"), user("r")]
    if change == "split('#')[-1]":
        shorter = [user("q"), bot("answer"), user("r")]
        assert chat.encode_prompt(messages) == chat.encode_prompt(shorter)
    else:
        with pytest.raises(DenserlError, match="rewrites the content"):
            chat.encode_prompt(messages)
    with pytest.raises(DenserlError, match="rewrites the content"):
        chat.encode_prompt([user("some#question")])


def test_messages_that_change_each_other_are_refused() -> None:
    template = PLAIN.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if 'x' in messages[0].content and 'y' in m.content %}!{% endif %}",
    )
    with pytest.raises(DenserlError, match="in another way together than alone"):
        ChatFormat.of(byte_tokenizer(template)).encode_prompt([user("x"), bot("y"), user("z")])


# what prompts end with


@pytest.mark.parametrize("ending", ["<bot>\n", "<end>", "<bot>"])
def test_prompts_that_end_in_another_way_are_refused(ending: str) -> None:
    with pytest.raises(DenserlError, match=r"chat\.prompt_ending: a prompt of user ends with") as e:
        ChatFormat.of(thinking_tokenizer(), prompt_ending=ending)
    assert repr("<end>\n<bot>" + EMPTY_THOUGHT) in e.value.message
    assert repr(ending) in e.value.message


def test_every_kind_of_prompt_must_end_that_way() -> None:
    moved = PLAIN.replace("<bot>{% endif %}", "{{ mark }}<bot>{% endif %}")
    moved = moved.replace("mark", "'!' if messages[0].role == 'system'")
    with pytest.raises(DenserlError, match="a prompt of system, user ends"):
        ChatFormat.of(byte_tokenizer(moved), prompt_ending="\n<bot>")
    refused = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    ChatFormat.of(byte_tokenizer(refused), prompt_ending="<bot>")


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("phi3-mini", "<|assistant|>\n"),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("llama3.1", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ],
)
def test_the_endings_of_real_prompts(shared: Path, name: str, ending: str) -> None:
    ChatFormat.of(load(shared / "tokenizers" / name), prompt_ending=ending)


# arguments


def test_an_argument_that_the_template_does_not_read_is_refused() -> None:
    with pytest.raises(DenserlError, match="'enable_thinkin', did you mean 'enable_thinking'"):
        ChatFormat.of(thinking_tokenizer(), template_arguments={"enable_thinkin": False})
    with pytest.raises(DenserlError, match="reads no variable 'enable_thinking'"):
        ChatFormat.of(byte_tokenizer(), template_arguments=QUIET)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools", "tokenize"])
def test_what_denserl_itself_passes_is_no_argument(name: str) -> None:
    template = PLAIN + "{% if tools and tokenize %}{% endif %}"
    with pytest.raises(DenserlError, match=f"reads no variable '{name}'"):
        ChatFormat.of(byte_tokenizer(template), template_arguments={name: True})


def test_an_argument_of_the_wrong_kind_is_a_message() -> None:
    template = "{{ 'On ' + day }}" + PLAIN
    with pytest.raises(DenserlError, match="refuses the conversation: can only concatenate str"):
        ChatFormat.of(byte_tokenizer(template), template_arguments={"day": 3})


def test_templates_may_mark_generations_and_break_out_of_loops() -> None:
    marked = "{% for m in messages %}{% if m.role == 'no' %}{% break %}{% endif %}{% endfor %}"
    marked += "{%- generation -%}{{ mood }}{%- endgeneration -%}" + PLAIN
    tokenizer = byte_tokenizer(marked)
    chat = ChatFormat.of(tokenizer, template_arguments={"mood": "fine"})
    assert chat.encode_prompt([user("q")]) == tokenizer.encode("fine<user>q<end>\n<bot>")


def test_a_broken_template_is_a_message() -> None:
    with pytest.raises(DenserlError, match=r"chat template of .* is broken: unexpected"):
        ChatFormat.of(byte_tokenizer("{% for m in messages %}{{ m }"))


def test_of_several_templates_the_default_one_is_taken() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "{{ tools }}"}
    assert ChatFormat.of(tokenizer).encode_response("a") == tokenizer.encode("a<end>")
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": PLAIN}
    with pytest.raises(DenserlError, match="several chat templates and no default"):
        ChatFormat.of(tokenizer)


# the day


@pytest.mark.parametrize("name", ["llama3.1", "phi3-mini"])
@pytest.mark.usefixtures("on_another_day")
def test_real_prompts_read_the_same_on_any_day(shared: Path, name: str) -> None:
    chat = ChatFormat.of(load(shared / "tokenizers" / name))
    text = chat.template.render([user("q")], True)
    assert "2031" not in text
    assert ("Today Date: 26 Jul 2024" in text) is (name == "llama3.1")


@pytest.mark.usefixtures("on_another_day")
def test_a_template_that_asks_for_the_day_gets_always_the_same() -> None:
    asks = (
        "{%- if strftime_now is defined -%}{{ strftime_now('%d %b %Y') }}{%- endif -%}"
        "{{ ' ' + strftime_now('%A, %Y-%m-%d') }}" + PLAIN
    )
    tokenizer = byte_tokenizer(asks)
    loose = tokenizer.apply_chat_template([user("q")], tokenize=False)
    assert loose.startswith("05 Dec 2031 Friday, 2031-12-05")
    fixed = ChatFormat.of(tokenizer).template.render([user("q")], False)
    assert (
        fixed == "26 Jul 2024 Friday, 2024-07-26" + loose[len("05 Dec 2031 Friday, 2031-12-05") :]
    )


@pytest.mark.usefixtures("on_another_day")
def test_the_recipe_may_set_the_day_that_a_template_reads() -> None:
    asks = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}" + PLAIN
    )
    for arguments, day in (({}, "26 Jul 2024"), ({"date_string": "1 May"}, "1 May")):
        chat = ChatFormat.of(byte_tokenizer(asks), template_arguments=arguments)
        assert chat.template.render([user("q")], True).startswith(day + "<user>")
