import math

from rich.console import Console

from denserl_cli.terminal.reward_colors import heat, heated, visible


def test_the_scale_is_orange_below_zero_blue_above_and_pale_at_it():
    def ground(reward: float, most: float = 2.0) -> tuple[int, ...]:
        color = heat(reward, most).bgcolor
        assert color and color.triplet
        return tuple(color.triplet)

    assert ground(-2) == (255, 194, 153) and ground(2) == ground(9) == (156, 200, 247)
    assert ground(0) == ground(0, most=0.0) == (238, 238, 238)
    assert ground(1)[0] > ground(2)[0] and ground(-1)[2] > ground(-2)[2]
    assert heat(math.nan, 1.0).reverse


def test_each_segment_is_followed_by_its_reward():
    text = heated(["Hello", " world", ""], [0.5, -1.234, math.nan], most_cells=80)
    assert text.plain == "Hello[+0.50] world[-1.23][+nan]"
    console = Console(width=80, no_color=True, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(text)
    assert "[-1.23]" in captured.get() and "48;2" not in captured.get()


def test_small_rewards_have_more_digits():
    assert heated(["a", "b"], [0.0003, -0.00002], 80).plain == "a[+0.00030]b[-0.00002]"
    assert heated(["a", "b"], [0.0, 1e-300], 80).plain == "a[+0.000000000]b[+0.000000000]"
    assert heated(["a", "b"], [0.0, 123.456], 80).plain == "a[+0.00]b[+123.46]"


def test_of_a_long_response_only_what_fits_is_drawn():
    for texts in (["a" * 5000], ["abc"] * 5000):
        text = heated(texts, [0.5] * (len(texts) - 1) + [-2.0], most_cells=800)
        assert 800 <= len(text) < 820
        first = text.spans[0].style
        assert first == heat(0.5 if len(texts) > 1 else -2.0, 2.0)  # the scale is the whole one's


def test_what_would_move_the_cursor_is_shown_instead():
    assert visible("a\nb\tc\x1b[2Jd\r\u202e") == "a↵b\\tc\\x1b[2Jd\\r\\u202e"
    assert visible("é 你好 👩‍🚀 [red]") == "é 你好 👩‍🚀 [red]"
