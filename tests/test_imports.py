"""Which way imports point, read from the source and seen in a fresh process."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "denserl_cli").rglob("*.py")
}
CORE = [name for name in FILES if name.startswith("denserl_cli.core")]
GROUND = {"denserl_cli.core.errors", "denserl_cli.core.system.files"}
MATHS = {
    f"denserl_cli.core.{name}"
    for name in (
        "segmentation",
        "likelihood",
        "precision",
        "normalizer",
        "reward_model.loss",
        "ppo.rewards",
        "ppo.actions",
        "ppo.advantages",
        "ppo.losses",
    )
}


LONGEST = 350
"""Lines of a file, unless a comment at its top that begins `# Long:` says why it has more."""


def statements(tree: ast.AST, types: bool) -> Iterator[ast.AST]:
    """All nodes, or all but those for the type checker alone."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not types:
            continue
        yield from statements(child, types)


def imported(name: str, *, types: bool = False) -> set[str]:
    """Names of the modules that a module imports, anywhere in it."""
    names = set()
    for node in statements(ast.parse(FILES[name].read_text(encoding="utf-8")), types):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in FILES else node.module)
    return names


@pytest.mark.parametrize("name", CORE)
def test_core_knows_no_terminal_and_no_command(name: str):
    for target in imported(name):
        assert target.partition(".")[0] not in ("typer", "click", "rich"), target
        if target.startswith("denserl_cli."):
            assert target.startswith("denserl_cli.core"), target


@pytest.mark.parametrize("name", sorted(MATHS & set(FILES)))
def test_maths_imports_only_maths_and_what_imports_nothing(name: str):
    own = {target for target in imported(name) if target.startswith("denserl_cli")}
    assert own <= MATHS | GROUND


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_imports_nothing_of_the_package(name: str):
    assert not imported(name) & set(FILES)


def test_there_is_no_circle_of_files():
    graph = {name: imported(name) & set(FILES) for name in FILES}
    TopologicalSorter(graph).prepare()


def room(name: str) -> str:
    """The folder that a module is in; a file of the package or of `core` stands for itself."""
    folder = FILES[name].parent.relative_to(ROOT / "denserl_cli")
    return name if str(folder) in (".", "core") else str(folder)


def test_there_is_no_circle_of_folders():
    """Not even by imports for the type checker alone."""
    graph: dict[str, set[str]] = {}
    for name in FILES:
        rooms = {room(target) for target in imported(name, types=True) & set(FILES)}
        graph.setdefault(room(name), set()).update(rooms - {room(name)})
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_long_file_says_why(name: str):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST or any(line.startswith("# Long: ") for line in lines[:12])


def test_a_recipe_is_accepted_before_anything_heavy_is_imported(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("model: {path: a/b}\nsegmentation: {cutoff: 1.0}\n")
    program = (
        "import sys, denserl_cli.app\n"
        "from denserl_cli.core.recipe import load_recipe\n"
        "load_recipe('r.yaml')\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'scipy', 'rich'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
