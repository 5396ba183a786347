"""The shipped recipes against the published tables (method §4, §6), typed here once more."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.catalog import list_recipes, recipes_folder
from denserl_cli.core.recipe.schema import Coefficients, Source
from tests import ROOT
from tests.core.fake_tokenizers import load

BACKBONES = {
    "phi3": ("microsoft/Phi-3-mini-4k-instruct", "phi3-mini", [32007, 32000]),
    "llama3.1": ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", [128009, 128001, 128008]),
    "llama3-sft": ("RLHFlow/LLaMA3-SFT-v2", "llama3", [128009, 128001]),
}
GRANULARITIES = ("segment", "token", "bandit")
NINE = [(backbone, granularity) for backbone in BACKBONES for granularity in GRANULARITIES]
CUTOFF = {"phi3": 1.75, "llama3.1": 2.0, "llama3-sft": 2.0}

# backbone, granularity: reward model, policy, w_mean, w_std, b_mean, b_std
PUBLISHED = {
    ("phi3", "segment"): (
        "yyqoni/Phi-3-mini-4k-instruct-segment-rm-700k",
        "yyqoni/Phi-3-mini-4k-segment-ppo-60k",
        (0.7668, 0.2569, 0.4705, 2.8339),
    ),
    ("phi3", "token"): (
        "yyqoni/Phi-3-mini-4k-instruct-token-rm-700k",
        "yyqoni/Phi-3-mini-4k-token-ppo-60k",
        (0.9628, 0.3796, 1.2917, 3.5006),
    ),
    ("phi3", "bandit"): (
        "yyqoni/Phi-3-mini-4k-instruct-bandit-rm-700k",
        "yyqoni/Phi-3-mini-4k-bandit-ppo-60k",
        (0.0, 0.0, -0.51953125, 2.15625),
    ),
    ("llama3.1", "segment"): (
        "yyqoni/meta-llama-3.1-instruct-8b-segment-rm-700k",
        "yyqoni/meta-llama-3.1-instruct-8b-segment-ppo-60k",
        (0.8345, 0.4780, 0.8798, 3.7358),
    ),
    ("llama3.1", "token"): (
        "yyqoni/meta-llama-3-1-instruct-8b-token-rm-700k",
        "yyqoni/meta-llama-3.1-instruct-8b-token-ppo-60k",
        (1.6268, 0.6254, 0.6419, 4.9217),
    ),
    ("llama3.1", "bandit"): (
        "yyqoni/meta-llama-3-1-instruct-8b-bandit-rm-700k",
        "yyqoni/meta-llama-3.1-instruct-8b-bandit-ppo-60k",
        (0.0, 0.0, -0.828125, 2.9375),
    ),
    ("llama3-sft", "segment"): (
        "yyqoni/rlhflow-llama-3-sft-8b-v2-segment-rm-700k",
        "yyqoni/rlhflow-llama-3-sft-8b-v2-segment-ppo-60k",
        (0.8967, 0.5680, 0.8572, 4.1667),
    ),
    ("llama3-sft", "token"): (
        "yyqoni/rlhflow-llama-3-sft-8b-v2-token-rm-700k",
        "yyqoni/rlhflow-llama-3-sft-8b-v2-token-ppo-60k",
        (1.7340, 0.9906, 1.3212, 5.4513),
    ),
    ("llama3-sft", "bandit"): (
        "yyqoni/rlhflow-llama-3-sft-8b-v2-bandit-rm-700k",
        "yyqoni/rlhflow-llama-3-sft-8b-v2-bandit-ppo-60k",
        (0.0, 0.0, -0.81640625, 2.953125),
    ),
}
COMMON = {
    "seed": 42,
    "sandbox": None,
    "lora": None,
    "model.dtype": "auto",
    "model.attention": "auto",
    "model.gradient_checkpointing": True,
    "data.preferences": (Source("hendrydong/preference_700K"),),
    "data.evaluation": (),
    "data.eval_pairs": 2000,
    "data.prompts": (Source("argilla/ultrafeedback-binarized-preferences-cleaned"),),
    "data.max_length": 2048,
    "data.max_prompt_length": 1728,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "optimizer.warmup_ratio": 0.03,
    "optimizer.min_lr_ratio": 0.1,
    "reward_model.epochs": 1.0,
    "reward_model.batch_size": 128,
    "reward_model.learning_rate": 1e-6,
    "reward_model.aggregate": "mean",
    "reward_model.eval_every": 512,
    "reward_model.save_every": 256,
    "normalizer.pairs": 60000,
    "normalizer.batch_size": 8,
    "normalizer.seed": 42,
    "normalizer.min_std": None,
    "ppo.iterations": None,
    "ppo.rollout.batch_size": 1024,
    "ppo.rollout.samples_per_prompt": 1,
    "ppo.train_batch_size": 128,
    "ppo.epochs": 1,
    "ppo.max_prompt_length": 1024,
    "ppo.rollout.max_new_tokens": 1024,
    "ppo.rollout.temperature": 1.0,
    "ppo.rollout.top_p": 1.0,
    "ppo.actor_learning_rate": 5e-7,
    "ppo.critic_learning_rate": 9e-6,
    "ppo.critic_init": "policy",
    "ppo.critic_warmup": 0,
    "ppo.gamma": 1.0,
    "ppo.lam": 0.95,
    "ppo.policy_clip": 0.2,
    "ppo.loss_reduce": "sequence",
    "ppo.segment_total": "sum",
    "ppo.reward_clip": 10.0,
    "ppo.kl_coef": 0.01,
    "ppo.kl_target": None,
    "ppo.kl_limit": None,
    "ppo.save_every": 5,
    "recorded.gpus": 8,
    "recorded.preference_pairs": 700_000,
    "recorded.prompts": 60_917,
    "reward_model.engine.zero_stage": 3,
    "reward_model.engine.offload_optimizer": False,
    "ppo.engine.zero_stage": 2,
    "ppo.engine.offload_optimizer": True,
}
OF_BACKBONE = {
    "phi3": {
        "reward_model.micro_batch_size": 8,
        "ppo.passes": 2.0,
        "ppo.micro_batch_size": 4,
        "ppo.rollout.micro_batch_size": 16,
        "recorded.gated": False,
    },
    "llama3.1": {
        "reward_model.micro_batch_size": 4,
        "ppo.passes": 1.0,
        "ppo.micro_batch_size": 2,
        "ppo.rollout.micro_batch_size": 4,
        "recorded.gated": True,
    },
    "llama3-sft": {
        "reward_model.micro_batch_size": 4,
        "ppo.passes": 1.0,
        "ppo.micro_batch_size": 2,
        "ppo.rollout.micro_batch_size": 4,
        "recorded.gated": False,
    },
}
OF_GRANULARITY = {
    "segment": ("location", "even", 0.25),
    "token": ("location", "even", 0.25),
    "bandit": ("global", "end", 0.2),
}


def value(recipe: Recipe, key: str) -> object:
    found: object = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


def test_the_shipped_recipes_are_these():
    assert list_recipes() == sorted(
        [
            *(f"{backbone}-{granularity}" for backbone, granularity in NINE),
            *(f"sandbox-{granularity}" for granularity in GRANULARITIES),
            *("sandbox-segment-macro", "sandbox-segment-rloo"),
            *("sandbox-bandit-differences", "sandbox-segment-differences", "sandbox-bandit-rto"),
            *(f"smollm2-{granularity}" for granularity in GRANULARITIES),
            *("smollm2-segment-macro", "smollm2-segment-rloo"),
            *("smollm2-segment-differences", "smollm2-bandit-rto"),
            "qwen3-segment",
        ]
    )


@pytest.mark.parametrize(("backbone", "granularity"), NINE)
def test_a_published_recipe_has_the_published_values(backbone: str, granularity: str):
    recipe = load_recipe(f"{backbone}-{granularity}")
    kind, interpolation, value_clip = OF_GRANULARITY[granularity]
    penalized = (backbone, granularity) == ("llama3.1", "segment")
    expected = {
        **COMMON,
        **OF_BACKBONE[backbone],
        "model.path": BACKBONES[backbone][0],
        "segmentation.granularity": granularity,
        "segmentation.cutoff": CUTOFF[backbone] if granularity == "segment" else None,
        "normalizer.kind": kind,
        "ppo.interpolation": interpolation,
        "ppo.value_clip": value_clip,
        "ppo.missing_eos_penalty": -0.05 if penalized else None,
        "ppo.overlong_penalty": -0.05 if penalized else None,
        "ppo.max_response_tokens": 800 if penalized else None,
        "ppo.length_normalize": (backbone, granularity) == ("llama3-sft", "token"),
    }
    assert {key: value(recipe, key) for key in expected} == expected


@pytest.mark.parametrize(("backbone", "granularity"), NINE)
def test_a_published_recipe_names_its_checkpoints_and_coefficients(backbone: str, granularity: str):
    published = load_recipe(f"{backbone}-{granularity}").published
    reward_model, policy, (w_mean, w_std, b_mean, b_std) = PUBLISHED[backbone, granularity]
    assert (published.reward_model, published.policy) == (reward_model, policy)
    assert published.granularity == granularity
    assert published.cutoff == (CUTOFF[backbone] if granularity == "segment" else None)
    assert published.normalizer == Coefficients(
        w_mean=w_mean, w_std=w_std, b_mean=b_mean, b_std=b_std
    )


def test_the_second_published_cutoff_of_phi3_is_not_the_recipes():
    """Method §4 has coefficients for Phi-3 at cutoff 2.0 too; the published models are at 1.75."""
    assert load_recipe("phi3-segment").published.normalizer.w_mean != 0.7209


@pytest.mark.parametrize("name", ["phi3-segment", "llama3.1-segment", "qwen3-segment"])
def test_recorded_shapes_make_the_recorded_number_of_parameters(name: str):
    recorded = load_recipe(name).recorded
    head = 128  # of every backbone here but Phi-3
    if name == "phi3-segment":
        head = recorded.hidden_size // recorded.heads
    attention = 2 * head * (recorded.heads + recorded.key_value_heads)
    matrices = recorded.hidden_size * (attention + 3 * recorded.intermediate_size)
    norms = 2 * recorded.hidden_size + (2 * head if name.startswith("qwen3") else 0)
    embeddings = 1 if name.startswith("qwen3") else 2  # tied or not
    total = recorded.layers * (matrices + norms) + recorded.hidden_size
    total += embeddings * recorded.vocabulary * recorded.hidden_size
    assert total == recorded.parameters


@pytest.mark.parametrize("backbone", BACKBONES)
def test_generation_stops_at_the_published_tokens(backbone: str, shared: Path):
    _, folder, ids = BACKBONES[backbone]
    tokenizer = load(shared / "tokenizers" / folder)
    settings, *others = [load_recipe(f"{backbone}-{g}").chat for g in GRANULARITIES]
    assert others == [settings, settings]
    chat = ChatFormat.of(
        tokenizer,
        terminator=settings.terminator,
        stop_tokens=settings.stop_tokens,
        template_arguments=settings.template_arguments,
        prompt_ending=settings.prompt_ending,
    )
    assert list(chat.stop_ids) == ids
    assert chat.terminator_id == ids[0]


def test_the_template_calibrates_its_cutoff_and_keeps_thinking_off():
    recipe = load_recipe("qwen3-segment")
    assert recipe.segmentation.cutoff == "auto"
    assert recipe.chat.template_arguments == {"enable_thinking": False}
    assert recipe.chat.prompt_ending == "<think>\n\n</think>\n\n"
    assert recipe.published is None


def header(name: str) -> str:
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return "\n".join(
        line.removeprefix("#").removeprefix(" ") for line in text.partition("\n\n")[0].splitlines()
    )


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_opens_with_what_a_reader_asks_first(name: str):
    text = header(name)
    purpose, _, rest = text.partition("\n\n")
    assert len(purpose) > 20
    assert re.findall(r"^(\w+)   ", rest, re.MULTILINE) == ["Hardware", "Duration", "Commands"]
    assert load_recipe(name).description


@pytest.mark.parametrize("name", list_recipes())
def test_the_commands_of_a_header_are_the_stages_and_run_as_a_plan(name: str):
    lines = [line for line in header(name).splitlines() if "denserl " in line]
    commands = [shlex.split(line[line.index("denserl ") :])[1:] for line in lines]
    commands = [words for words in commands if words[0] != "recipes"]
    assert commands == [[s, "--recipe", name] for s in ("train-rm", "fit-function", "train-ppo")]
    for words in commands:
        result = CliRunner().invoke(app, [*words, "--dry-run"])
        assert result.exit_code == 0, result.exception
        assert f"\nname: {name}\n" in result.output


@pytest.mark.parametrize("name", list_recipes())
def test_a_copy_of_a_recipe_loads_anywhere(name: str, tmp_path: Path):
    copied = CliRunner().invoke(app, ["recipes", "copy", name, str(tmp_path / "mine.yaml")])
    assert copied.exit_code == 0
    mine, shipped = load_recipe(str(tmp_path / "mine.yaml")), load_recipe(name)
    assert (mine.ppo, mine.published, mine.data) == (shipped.ppo, shipped.published, shipped.data)


@pytest.mark.parametrize(
    ("stage", "setting", "message"),
    [
        ("train-rm", "reward_model.batch_size=100", "100 is not a multiple of"),
        ("train-ppo", "ppo.train_batch_size=130", "130 does not divide the 1024 responses"),
        ("train-ppo", "ppo.micro_batch_size=3", "128 is not a multiple of ppo.micro_batch_size 3"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(stage: str, setting: str, message: str):
    words = [stage, "--recipe", "phi3-segment", "--set", setting, "--dry-run"]
    assert message in str(CliRunner().invoke(app, words).exception)


def test_every_command_of_the_published_page_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8").replace("\\\n", " ")
    cells = re.findall(r"`(denserl (?:train|fit)[^`]*)`", page)
    lines = re.findall(r"^denserl train.*", page, re.MULTILINE)
    experiments = [f"{b}-{g}" for b, g in NINE]
    for stage in ("train-rm", "fit-function", "train-ppo"):
        shown = [cell for cell in cells if cell.startswith(f"denserl {stage} ")]
        assert sorted({shlex.split(cell)[-1] for cell in shown}) == sorted(experiments)
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "q"}\n' * 1200)
    for command in lines:
        result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--dry-run"])
        assert result.exit_code == 0, f"{command}: {result.exception!r}"
