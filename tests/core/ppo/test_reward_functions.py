import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from denserl_cli.core.data.conversations import Prompt
from denserl_cli.core.errors import DenserlError, RecipeError
from denserl_cli.core.evaluation.policy import evaluate_policy
from denserl_cli.core.observer import Observer
from denserl_cli.core.ppo import reward_functions, reward_sources
from denserl_cli.core.ppo.reward_functions import UserFunction, placed
from denserl_cli.core.ppo.reward_sources import RewardSources
from denserl_cli.core.ppo.rewards import RewardSettings
from denserl_cli.core.ppo.rollout import Rollout
from denserl_cli.core.recipe.schema import PPOConfig, Recipe, RewardSource, SegmentationConfig
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.stages.export import export
from denserl_cli.core.stages.run import run_stage
from tests import ROOT, tiny

PROMPTS = [
    Prompt([{"role": "user", "content": f"p{n}"}], f"data.jsonl:{n + 1}", {"n": n})
    for n in range(2)
]


class Words:
    """Token 7 reads " w7"."""

    def decode(self, ids, **options):
        return "".join(f" w{one}" for one in ids)

    def batch_decode(self, rows, skip_special_tokens=False):
        return [self.decode(row) for row in rows]


@pytest.fixture
def two() -> Rollout:
    """Two responses: segments of 2 and 1 tokens and a terminator; one token, cut off."""
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    zeros = torch.zeros(2, 4)
    return Rollout(
        prompts=[np.array([1])] * 2,
        responses=[np.array([3, 4, 5, 2]), np.array([6])],
        terminated=torch.tensor([True, False]),
        response_mask=mask,
        logprobs=zeros,
        reference_logprobs=zeros,
        entropy=zeros,
        policy_entropy=zeros,
        values=zeros,
        token_values=None,
        ends=torch.tensor([[False, True, True, False], [True, False, False, False]]),
    )


def own(monkeypatch, *functions, weights=(), **ppo):
    """Sources of plain functions, in a module that exists for one test."""
    module = SimpleNamespace(**{f.__name__: f for f in functions})
    monkeypatch.setitem(sys.modules, "given", module)
    weights = weights or [1.0] * len(functions)
    rewards = tuple(
        RewardSource(f"python:given.{f.__name__}", w)
        for f, w in zip(functions, weights, strict=True)
    )
    settings = {"interpolation": "even", "reward_clip": 100.0, "rewards": rewards, **ppo}
    recipe = Recipe("r", segmentation=SegmentationConfig(), ppo=PPOConfig(**settings))
    return RewardSources(recipe, Words())


def test_each_kind_of_reward_reaches_its_tokens(two, monkeypatch):
    def whole(responses):
        return [3.0, np.float32(1)]

    def pieces(segments):
        return [[2, 4], [1]]

    def tokens(token_ids):
        return [np.array([1.0, 2, 3, 4]), [5.0]]

    rewards = own(monkeypatch, whole)(PROMPTS, two)
    assert rewards.tokens.tolist() == [[0, 0, 0, 3], [1, 0, 0, 0]]
    assert rewards.totals["reward_whole"].tolist() == [3, 1]
    rewards = own(monkeypatch, pieces)(PROMPTS, two)
    assert rewards.tokens.tolist() == [[1, 1, 4, 0], [1, 0, 0, 0]]
    rewards = own(monkeypatch, pieces, segment_total="mean", interpolation="repeat")(PROMPTS, two)
    assert rewards.tokens.tolist() == [[1, 1, 2, 0], [1, 0, 0, 0]]
    assert rewards.totals["reward_pieces"].tolist() == [3, 1]
    rewards = own(monkeypatch, tokens)(PROMPTS, two)
    assert rewards.tokens.tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]
    rewards = own(monkeypatch, whole, tokens, weights=(10.0, -1.0))(PROMPTS, two)
    assert rewards.tokens.tolist() == [[-1, -2, -3, 26], [5, 0, 0, 0]]
    assert rewards.totals["reward_tokens"].tolist() == [10, 5]


def test_a_function_has_what_it_asks_for(two, monkeypatch):
    asked = {}

    def everything(**given):
        asked.update(given)
        return [0.0, 0.0]

    own(monkeypatch, everything)(PROMPTS, two)
    assert asked["prompts"] == ["p0", "p1"] and asked["responses"] == [" w3 w4 w5 w2", " w6"]
    assert asked["messages"][1] == [{"role": "user", "content": "p1"}]
    assert asked["token_ids"] == [[3, 4, 5, 2], [6]] and asked["terminated"] == [True, False]
    assert asked["segments"] == [[(" w3 w4", 0, 1), (" w5", 2, 2)], [(" w6", 0, 0)]]
    assert asked["rows"] == [{"n": 0}, {"n": 1}] and "recipe" in asked

    def unknown(responses, colour, size=1):
        return []

    with pytest.raises(DenserlError, match="asks for colour"):
        own(monkeypatch, unknown)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned 1 values for 2 responses"),
        (None, "returned None for 2 responses"),
        ([1.0, float("nan")], r"answer for data.jsonl:2 is nan, not a finite number"),
        ([1.0, 10**400], r"answer for data.jsonl:2 is a int, not a finite number"),
        ([1.0, "good"], r"answer for data.jsonl:2 is 'good', not a finite"),
        ([[1.0, None], [1.0]], r"answer for data.jsonl:1 is None"),
        ([[1.0, 2.0], [1.0, 2.0]], r"data.jsonl:2 is 2 numbers, the response has 1 segments and 1"),
        ([[1.0, 2.0, 3.0], [1.0]], r"data.jsonl:1 is 3 numbers, the response has 2 segments and 4"),
        ([[1.0, 2.0], 1.0], r"data.jsonl:2 is one number, the response has 1 segments"),
    ],
)
def test_what_no_reward_can_be_made_of(two, monkeypatch, answer, message):
    def give(responses):
        return answer

    give.__name__ = "answer"
    with pytest.raises(DenserlError, match=message):
        own(monkeypatch, give)(PROMPTS, two)


def test_kinds_that_differ_name_the_first_response_that_does(two):
    mask = torch.ones(3, 3, dtype=torch.bool)
    ends = torch.tensor([[True, True, True], [False, True, True], [False, True, True]])
    three = two._replace(response_mask=mask, ends=ends)
    where = ["f for a:1", "f for a:2", "f for a:3"]
    with pytest.raises(DenserlError, match="f for a:3 is 3 numbers"):
        placed([[1.0] * 3, [1.0] * 2, [1.0] * 3], three, RewardSettings(), where)


def test_the_result_does_not_depend_on_the_number_of_processes(two, monkeypatch):
    def length(token_ids):
        return [float(len(ids)) for ids in token_ids]

    one = own(monkeypatch, length)(PROMPTS, two)
    for rank in (0, 1):
        monkeypatch.setattr(reward_functions, "rank", lambda rank=rank: rank)
        for module in (reward_functions, reward_sources):
            monkeypatch.setattr(module, "world_size", lambda: 2)
        monkeypatch.setattr(reward_sources, "all_gather_object", lambda mine: [[4.0], [1.0]])
        assert torch.equal(own(monkeypatch, length)(PROMPTS, two).tokens, one.tokens)


def test_rewards_add_up_before_the_clip_and_the_penalties(two, monkeypatch):
    def mine(responses):
        return [[1.0, 0, 0, 3], [1]]

    monkeypatch.setitem(sys.modules, "given", SimpleNamespace(mine=mine))
    recipe = tiny.recipe(
        "ppo.rewards=[{source: values, weight: 0.5}, true_reward]",
        "ppo.missing_eos_penalty=-2",
        "ppo.segment_total=sum",
    )
    rewards = (*recipe.ppo.rewards[:1], RewardSource("python:given.mine"))
    recipe = replace(recipe, ppo=replace(recipe.ppo, rewards=rewards))
    scored = two._replace(token_values=torch.tensor([[9.0, 4, 30, 9], [1, 0, 0, 0]]))
    sources = RewardSources(recipe, Words(), {"": None})
    assert sources(PROMPTS, scored).tokens.tolist() == [[2, 1, 10, 3], [-2, 0, 0, 0]]
    alone = replace(recipe, ppo=replace(recipe.ppo, rewards=rewards[1:]))
    given = RewardSources(alone, Words())(PROMPTS, two)
    assert given.tokens.tolist() == [[1, 0, 0, 3], [-2, 0, 0, 0]]


def test_all_that_is_wrong_with_rewards_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text("import torch\ndef good(responses): ...\nx, y = 1, 2\n")
    (tmp_path / "torn.py").write_text("def good(:\n")
    (tmp_path / "r.yaml").write_text(
        "extends: sandbox-segment\nppo:\n  critic_init: reward_model\n  rewards:\n"
        "    - python:mine.good\n    - python:mine.god\n    - python:mine.good\n"
        "    - {source: python:absent.good}\n    - python:torn.good\n    - python:good\n"
        "    - true_rewards\n    - {source: python:mine.y, weight: 0, per: token}\n"
    )
    with pytest.raises(RecipeError) as refused:
        tiny.load_recipe("r.yaml")
    text = str(refused.value)
    for line, message in (
        (3, "ppo.critic_init: there is no reward model"),
        (6, r"ppo.rewards\[1\].source: no god in .*mine.py, did you mean good"),
        (7, "a second reward called good"),
        (8, "no module absent in the current directory"),
        (9, r"torn.py:1: "),
        (10, "'python:good' is not python:module.function"),
        (11, "no installed reward is called 'true_rewards'; there are true_reward"),
        (12, r"unknown key ppo.rewards\[7\].per"),
    ):
        assert re.search(rf"^r.yaml:{line}: .*{message}", text, re.M), (line, text)
    for settings in (
        "ppo.rewards=[]",
        "ppo.rewards=[{source: true_reward, weight: 0}]",
    ):
        with pytest.raises(RecipeError, match="nothing is rewarded"):
            tiny.recipe(settings)


def test_a_function_of_ones_own_trains_a_policy(tmp_path, monkeypatch):
    """No reward model, no normaliser; then evaluation and export, as after any training."""
    monkeypatch.chdir(ROOT)
    recipe, run = tiny.recipe("ppo.rewards=python:tests.reward_functions.variety"), tmp_path / "run"
    run_stage("train-ppo", recipe, run, "start", Observer())
    assert not (run / "reward_model").exists() and (run / "policy_best").is_dir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "eval_reward_variety" in lines[0] and "rm_score" not in lines[1]
    assert lines[1]["dense_reward"] == pytest.approx(lines[1]["reward_variety"], abs=1e-4)
    found = evaluate_policy(recipe, RunFolder(run, recipe), Observer(), samples=2)
    assert found["reward_model"] is None and "reward_variety" in found["trained"]
    assert "dense_reward" in found["best_of_n"][0]
    export("policy", recipe, RunFolder(run, recipe), tmp_path / "out", replace=False)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_failing_function_shows_its_own_lines(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def grade(text):\n    return 1 / (len(text) - len(text))\n\n\n"
        "def broken(responses):\n    return [grade(text) for text in responses]\n"
    )
    words = tiny.words("ppo.rewards=python:mine.broken")
    done = subprocess.run(
        [sys.executable, "-m", "denserl_cli.app", "train-ppo", "-r", "sandbox-segment", *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "the reward python:mine.broken failed:" in done.stderr
    assert 'mine.py", line 2, in grade' in done.stderr and "ZeroDivisionError" in done.stderr
    assert "reward_functions.py" not in done.stderr and "Traceback" not in done.stderr


def leave(responses):
    raise SystemExit(0)


def test_a_function_cannot_end_the_training_nor_hide_what_it_takes(monkeypatch, two):
    with pytest.raises(DenserlError, match=r"failed:[\s\S]*SystemExit: 0"):
        own(monkeypatch, leave)(PROMPTS, two)
    with pytest.raises(DenserlError, match="does not say what it takes"):
        UserFunction("python:builtins.max")


def test_the_examples_of_the_docs_work(tmp_path):
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    there: dict = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), there)
    answers = ["2 + 3 is 5.", "I think 1,005", "no idea"]
    assert there["exact"](answers, [{"answer": 5}, {"answer": "1005"}, {"answer": 1}]) == [1, 1, 0]
    pieces = [SimpleNamespace(text="five words are in here") for _ in range(4)]
    assert there["brief"]([pieces, pieces[:1]]) == [[0, 0, 0, -1], [0]]


def test_the_true_reward_is_the_tasks_alone(two):
    recipe = tiny.recipe("ppo.rewards=true_reward")
    with pytest.raises(DenserlError, match="does not know the prompt 'p0'"):
        RewardSources(recipe, Words())(PROMPTS, two)
