import pytest

from denserl_cli.core.recipe.document import given, plain, read_document, to_yaml


def read(text: str):
    problems: list[str] = []
    node = read_document(text, lambda at: f"r.yaml:{at}", problems)
    return node, problems


def test_scalars_are_those_of_yaml_1_2():
    node, problems = read(
        "a: 1e-6\nb: on\nc: 2024-07-26\nd: 010\ne: 60_000\nf: ~\ng: true\nh: '1'\ni: -.5\nj:\n"
    )
    assert problems == []
    assert plain(node) == {
        "a": 1e-6,
        "b": "on",
        "c": "2024-07-26",
        "d": 10,
        "e": 60000,
        "f": None,
        "g": True,
        "h": "1",
        "i": -0.5,
        "j": None,
    }


def test_a_value_stands_where_its_key_stands():
    node, _ = read("\nppo:\n\n  epochs:\n    1\nlist:\n  - a\n  - b\n")
    assert node.value["ppo"].place == "r.yaml:2"
    assert node.value["ppo"].value["epochs"].place == "r.yaml:4"
    assert node.value["list"].value[1].place == "r.yaml:8"


def test_duplicate_keys_are_found_at_every_depth():
    _, problems = read("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n")
    assert problems == [
        "r.yaml:4: duplicate key b.c, first at r.yaml:3",
        "r.yaml:5: duplicate key a, first at r.yaml:1",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1, 2\nb: 3\n", "r.yaml:2:2: not valid YAML: while parsing a flow sequence"),
        ("a: 1\n b: 2\n", "r.yaml:2:3: not valid YAML: mapping values are not allowed here"),
        ("a: 1\nb: \x00\n", "r.yaml:2:4: not valid YAML: special characters are not allowed"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: not valid YAML: expected a single document"),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml:1: tags (tag:yaml.org,2002:python"),
        ("a: !!str 3\n", "r.yaml:1: tags (tag:yaml.org,2002:str) are not allowed"),
        ("a: &x [1]\nb: *x\n", "r.yaml:2: aliases (*x) are not allowed"),
        ("a: " + "[" * 2000 + "]" * 2000, "r.yaml:1: nested too deeply"),
    ],
)
def test_text_that_is_no_plain_yaml(text: str, problem: str):
    node, problems = read(text)
    assert node is None
    assert len(problems) == 1
    assert problems[0].startswith(problem)


@pytest.mark.parametrize("text", ["1: a\n", "[a]: b\n", "true: b\n", "? {a: b}\n: c\n"])
def test_keys_are_text(text: str):
    _, problems = read(text)
    assert problems == ["r.yaml:1: a key must be text; put it in quotes"]


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_no_document_is_null(text: str):
    node, problems = read(text)
    assert node.value is None and problems == []


def test_written_yaml_reads_back_to_the_same_values():
    value = {
        "texts": ["1e-6", "on", "yes", "null", "", "12", "2024-07-26", "a: b", "é\n x", "[0]"],
        "numbers": [1e-6, 5e-7, 1.0, -3, 10**17],
        "others": [None, True, False, [], {}],
    }
    node, problems = read(to_yaml(value))
    assert problems == []
    assert plain(node) == value


def test_given_values_carry_the_option_as_their_place():
    node = given(["a"], "--data a")
    assert node.value[0].value == "a" and node.value[0].place == "--data a"
