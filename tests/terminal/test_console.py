from denserl_cli.core.errors import DenserlError, Interrupted, RecipeError
from denserl_cli.terminal import console
from tests.pretend_terminal import open_terminal, without_codes


def test_a_piped_error_is_plain_unfolded_text(capsys):
    console.print_error(DenserlError("no [bold]such[/] thing " + "x" * 200, hint="make one"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: no [bold]such[/] thing {'x' * 200}\nhint: make one\n"


def test_several_problems_start_their_own_lines(capsys):
    console.print_error(RecipeError(["r.yaml:1: a", "r.yaml:2: b"]))
    assert capsys.readouterr().err == "error:\nr.yaml:1: a\nr.yaml:2: b\n"
    console.print_error(Interrupted("saved", hint="--resume"))
    assert capsys.readouterr().err == "interrupted: saved\nhint: --resume\n"


def test_an_error_on_a_terminal_is_framed(monkeypatch):
    terminal = open_terminal(monkeypatch)
    console.print_error(DenserlError("data.prompts[0] [red]is[/red] missing", hint="name one"))
    text = without_codes(terminal.getvalue())
    assert "╭─ Error" in text and "data.prompts[0] [red]is[/red] missing" in text
    assert "name one" in text
    assert "\x1b[31m" in terminal.getvalue()


def test_no_color_takes_the_colours_away(monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    console.print_error(DenserlError("missing"))
    assert "Error" in terminal.getvalue()
    assert "\x1b[31m" not in terminal.getvalue()


def test_a_piped_table_is_whole_and_plain(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = "[x] " + "word " * 40
    console.print_table("Fit", ("name", "value"), [(long, 0.123456), ("n", 3.0)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "…" not in out
    assert long.strip() in out
    lines = [line.rstrip() for line in out.splitlines()]
    assert next(line for line in lines if "[x]" in line).endswith("0.1235")
    assert next(line for line in lines if line.startswith("  n ")).endswith("     3")


def test_a_table_on_a_narrow_terminal_folds(monkeypatch):
    terminal = open_terminal(monkeypatch, "stdout")
    console.print_table("", ("a", "b"), [("x" * 100, None)])
    text = without_codes(terminal.getvalue())
    assert text.count("x") == 100 and "-" in text
    assert max(len(line) for line in text.splitlines()) <= 80
