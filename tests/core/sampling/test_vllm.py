"""The engine `vllm` with a vLLM: `make test-vllm` makes an environment that has one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.engine.frozen import LocalModel
from denserl_cli.core.errors import DenserlError, ServiceError
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import RolloutConfig
from denserl_cli.core.sampling.base import Request, Response, Sampling
from denserl_cli.core.sampling.vllm_engine import VllmSampling
from denserl_cli.core.sampling.vllm_process import VllmProcess, _command
from denserl_cli.core.sampling.vllm_server import Server
from denserl_cli.core.stages.run import run_stage
from tests import tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"
)

SETTINGS = (*tiny.SETTINGS, "sandbox.hidden_size=64", "sandbox.heads=2")
"""vLLM's attention on a CPU has no head size of 16."""
LENGTH = 512
STOPS = (9, 10)


def recipe(*settings: str) -> Any:
    return load_recipe("sandbox-segment", [*SETTINGS, *settings])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "run"
    for stage in ("train-rm", "fit-function"):
        run_stage(stage, recipe(), folder, "start", Observer())
    return folder


def model_folder(run: Path) -> Path:
    (config,) = run.glob("sandbox/**/config.json")
    return config.parent


def policy(run: Path) -> LocalModel:
    return LocalModel(
        AutoModelForCausalLM.from_pretrained(model_folder(run), dtype=torch.float32).eval(),
        torch.float32,
    )


@contextmanager
def served(model: Path, log: Path, **more: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server as a user would start it; yields its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options: dict[str, Any] = {
        "model": str(model),
        "port": port,
        "host": "127.0.0.1",
        "dtype": "float32",
        "enforce-eager": True,
        "skip-tokenizer-init": True,
        "max-model-len": LENGTH,
        "no-enable-chunked-prefill": True,
        "kv-cache-memory-bytes": 2**27,
        "logprobs-mode": "processed_logprobs",
        "enable-scale-out": True,
        "weight-transfer-config": '{"backend": "denserl-file"}',
        **more,
    }
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            _command(options),
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}")
    until = time.monotonic() + 600
    try:
        while True:
            try:
                server.ask("GET", "/health", wait=5.0)
                break
            except DenserlError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.3)
        yield server.address, process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(model_folder(run), tmp_path_factory.mktemp("log") / "log") as (address, _):
        yield address


@pytest.fixture(scope="module", params=["colocated", "server"])
def sampling(
    request: pytest.FixtureRequest, run: Path
) -> Iterator[tuple[VllmSampling, LocalModel]]:
    """An engine of either kind with a policy of its own."""
    held = policy(run)
    address = None if request.param == "colocated" else request.getfixturevalue("server")
    settings = RolloutConfig(engine="vllm", server=address, rows=16, memory_share=0.05)
    engine = VllmSampling(held, settings, pad_id=0, max_length=LENGTH)
    yield engine, held
    engine.close()


def requests() -> list[Request]:
    """Prompts of many lengths; the first and the last are the same 300 tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, 20, length).astype(np.int32) for length in (300, 3, 40, 7)]
    return [Request(p, (42, i), 24) for i, p in enumerate([*prompts, prompts[0]])]


def distance(
    engine: VllmSampling, held: LocalModel, temperature: float = 1.0
) -> tuple[float, list[Response]]:
    """The largest difference of the log-probabilities of vLLM and policy, and the responses."""
    drawn = engine.sample(requests(), Sampling(24, STOPS, temperature), lambda count: None)
    prompts = [request.prompt for request in requests()]
    batch = collate_sequences(prompts, [response.ids for response in drawn], 0)
    with torch.no_grad():
        own = held(response_logprobs, batch, temperature=temperature, with_entropy=False).logprobs
    apart = [
        np.abs(own[row, : len(response.ids)].numpy() - response.logprobs).max()
        for row, response in enumerate(drawn)
    ]
    return float(max(apart)), drawn


def change(held: LocalModel, seed: int) -> None:
    """What an update does, only more of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in held.model.named_parameters():
            size = 0.1 if "lora_" in name else 0.1 * weight.abs().mean()
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def test_log_probabilities_are_the_trainers(sampling: tuple[VllmSampling, LocalModel]):
    engine, held = sampling
    engine.refresh()
    apart, drawn = distance(engine, held)
    assert apart < 1e-5
    assert all(r.terminated == (r.ids[-1] in STOPS) for r in drawn)
    again = distance(engine, held)[1]
    assert [r.ids.tolist() for r in again] == [r.ids.tolist() for r in drawn]
    assert drawn[0].ids.tolist() != drawn[-1].ids.tolist()  # one prompt, two keys
    assert distance(engine, held, temperature=0.7)[0] < 1e-5


def test_they_still_are_after_an_update(sampling: tuple[VllmSampling, LocalModel]):
    engine, held = sampling
    change(held, 1)
    engine.refresh()
    assert distance(engine, held)[0] < 1e-5


def test_without_an_emptied_cache_they_are_not(
    sampling: tuple[VllmSampling, LocalModel], monkeypatch: pytest.MonkeyPatch
):
    engine, held = sampling
    engine.refresh()
    assert distance(engine, held)[0] < 1e-5
    change(held, 2)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_empty_cache", lambda: None)
        engine.refresh()
        assert distance(engine, held)[0] > 1e-3
    engine.refresh()
    assert distance(engine, held)[0] < 1e-5


def test_a_nucleus_has_its_own_distribution(sampling: tuple[VllmSampling, LocalModel]):
    engine, held = sampling
    engine.refresh()
    (drawn,) = engine.sample(requests()[:1], Sampling(24, (), top_p=0.5), lambda count: None)
    batch = collate_sequences([requests()[0].prompt], [drawn.ids], 0)
    with torch.no_grad():
        own = held(response_logprobs, batch, with_entropy=False).logprobs[0].numpy()
    assert (drawn.logprobs >= own - 1e-5).all() and (drawn.logprobs - own).max() > 0.01


def test_merged_adapters_before_and_after_an_update(sampling: tuple[VllmSampling, LocalModel]):
    engine, held = sampling
    held.model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    held.model.eval()
    for seed in (3, 4):
        change(held, seed)
        engine.refresh()
        assert distance(engine, held)[0] < 1e-5


def test_a_tied_head_follows_the_embedding(tmp_path: Path):
    """vLLM's CPU backend keeps a packed copy of the head: `vllm_weights` sends it as well."""
    held = tiny.frozen(tiny.causal_lm(tied=True, vocabulary=64, hidden=64))
    settings = RolloutConfig(engine="vllm", rows=16, memory_share=0.05)
    engine = VllmSampling(held, settings, pad_id=0, max_length=256)
    try:
        for seed in (5, 6):
            change(held, seed)
            engine.refresh()
            engine.probed = False
            engine.sample([], Sampling(4, ()), lambda count: None)  # the probe compares
    finally:
        engine.close()


def test_a_policy_that_vllm_does_not_know():
    config = OpenAIGPTConfig(vocab_size=32, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    config.architectures = ["OpenAIGPTLMHeadModel"]
    settings = RolloutConfig(engine="vllm", memory_share=0.05)
    with pytest.raises(DenserlError, match=r"vLLM did not start: .*OpenAIGPT") as caught:
        VllmProcess(settings, config, dtype=torch.float32, max_length=64)
    assert "ppo.rollout.engine=torch" in (caught.value.hint or "")


def test_what_vllm_says_when_it_fails():
    held = tiny.frozen(tiny.causal_lm(hidden=32))  # a head size of 16
    settings = RolloutConfig(engine="vllm", memory_share=0.05)
    engine = VllmSampling(held, settings, pad_id=0, max_length=64)
    try:
        with pytest.raises(ServiceError, match=r"failed: .*(16|head)") as caught:
            engine.sample(requests()[1:2], Sampling(4, ()), lambda count: None)
    finally:
        engine.close()
    assert "ppo.rollout.engine=torch" in (caught.value.hint or "")


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "train-ppo"]


def test_ppo_with_a_vllm_beside_it(run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    asked = recipe("ppo.rollout.engine=vllm", "ppo.rollout.memory_share=0.05", "ppo.iterations=2")
    run_stage("train-ppo", asked, folder, "start", Observer())
    found = [line for line in metrics(folder) if "mismatch_kl" in line]
    assert len(found) == 2
    assert all(abs(line["mismatch_kl"]) < 1e-5 for line in found)
    assert all(abs(line["importance_mean"] - 1) < 1e-4 for line in found)
    assert all(line["importance_capped"] == 0 for line in found)


def test_its_log_probabilities_can_stand_for_the_policys(run: Path, tmp_path: Path):
    """vLLM tells no entropy; the run goes on without."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    words = ("ppo.rollout.engine=vllm", "ppo.rollout.memory_share=0.05")
    asked = recipe(*words, "ppo.rollout.old_logprobs=sampled", "ppo.iterations=3")
    run_stage("train-ppo", asked, folder, "start", Observer())
    found = metrics(folder)[1:]
    assert [line["step"] for line in found] == [1, 2, 3]
    assert not any("entropy" in line for line in found)
    assert all(np.isfinite(line["policy_loss"]) for line in found)


KILLER = """
import os, signal
from pathlib import Path

calls = 0

def once(prompts, responses):
    global calls
    calls += 1
    mark = Path(os.environ["DENSERL_TEST_MARK"])
    if calls == 4 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(responses)
"""


def test_a_run_killed_between_rollout_and_update_resumes(
    run: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rewards are asked for after each sampling: evaluation, 1, 2, evaluation: the fourth dies."""
    (tmp_path / "killer.py").write_text(KILLER)
    mark = tmp_path / "mark"
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    words = ["ppo.rollout.engine=vllm", f"ppo.rollout.server={server}", "ppo.save_every=1"]
    words += ["ppo.eval_every=100"]
    words += ["ppo.rewards=[values, {source: python:killer.once, weight: 0.0}]"]
    command = [sys.executable, "-m", "denserl_cli.app", "train-ppo", "--recipe", "sandbox-segment"]
    for setting in (*SETTINGS, *words):
        command += ["--set", setting]
    command += ["--out", str(folder)]
    environment = os.environ | {
        "DENSERL_TEST_MARK": str(mark),
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -9 and mark.exists(), killed.stderr
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line["step"] for line in metrics(folder)]
    assert steps == [0, 1, 2, 3, 4] and (folder / "policy" / "model.safetensors").is_file()


def test_another_model_and_a_death(run: Path, tmp_path: Path):
    """A server with another vocabulary refuses the weights; one that dies ends the sampling."""
    other = tiny.causal_lm(vocabulary=64, hidden=64)
    other.save_pretrained(tmp_path / "other")
    with served(tmp_path / "other", tmp_path / "log", **{"max-model-len": "256"}) as (
        address,
        process,
    ):
        held = policy(run)
        chosen = RolloutConfig(engine="vllm", server=address)
        engine = VllmSampling(held, chosen, pad_id=0, max_length=256)
        with pytest.raises(DenserlError, match="did not take the policy's weights") as caught:
            engine.sample(requests(), Sampling(4, ()), lambda count: None)
        assert str(tmp_path / "other") in (caught.value.hint or "")
        own = VllmSampling(tiny.frozen(other), chosen, pad_id=0, max_length=256)
        end(process)
        with pytest.raises(ServiceError, match="does not answer"):
            own.sample(requests(), Sampling(4, ()), lambda count: None)
