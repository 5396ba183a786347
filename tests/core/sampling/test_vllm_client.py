"""What of the engine `vllm` needs no vLLM: checks, requests, weights, transfers, the keeper."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from denserl_cli.core.errors import DenserlError, ServiceError
from denserl_cli.core.recipe.schema import RolloutConfig
from denserl_cli.core.sampling import vllm_process
from denserl_cli.core.sampling.base import Request, Sampling
from denserl_cli.core.sampling.sampler import Sampler
from denserl_cli.core.sampling.vllm_engine import VllmSampling, check_vllm
from denserl_cli.core.sampling.vllm_server import Server, seed_of
from denserl_cli.core.sampling.vllm_transfer import FileTransfer, IpcTransfer, NcclTransfer
from denserl_cli.core.sampling.vllm_weights import weight_buckets
from tests import ROOT, tiny
from tests.core.sampling.vllm_fakes import FakeVllm, fake_vllm
from tests.core.sampling.vllm_worker import NoProbe
from tests.core.stages.test_train_ppo import copied, outcome, train

SAMPLING = Sampling(max_new_tokens=8, stop_ids=(5,), temperature=0.7, top_p=0.9)
REQUEST = Request(np.array([1, 2, 3], np.int32), (42, 1, 0, 0), 6)


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_vllm() as found:
        yield found


def settings(fake: FakeVllm, **fields: Any) -> RolloutConfig:
    return RolloutConfig(engine="vllm", server=fake.address, **fields)


def ignore(count: int) -> None:
    """Progress that nobody watches."""


# requests


def test_a_request_says_everything_about_the_distribution(fake: FakeVllm):
    (response,) = Server(fake.address).generate([REQUEST], SAMPLING, "default", ignore)
    path, body = fake.asked[-1]
    assert path == "/inference/v1/generate" and body["token_ids"] == [1, 2, 3]
    asked = body["sampling_params"]
    assert (asked["max_tokens"], asked["temperature"], asked["top_p"]) == (6, 0.7, 0.9)
    assert asked["top_k"] == 0 and asked["ignore_eos"] and asked["stop_token_ids"] == [5]
    assert asked["seed"] == seed_of(REQUEST.key) != seed_of((42, 1, 0, 1))
    assert 0 <= asked["seed"] < 2**63
    assert response.ids.tolist() == [7, 8, 5] and response.terminated
    assert response.logprobs.tolist() == [-0.5] * 3


def test_responses_come_in_the_order_of_the_requests(fake: FakeVllm):
    def echo(body: Any) -> Any:
        time.sleep(0.02 * (5 - body["token_ids"][0]))
        answer = fake.generate(body)
        answer["choices"][0]["token_ids"] = [body["token_ids"][0]]
        answer["choices"][0]["logprobs"]["content"][1:] = []
        return answer

    fake.answers["/inference/v1/generate"] = echo
    requests = [REQUEST._replace(prompt=np.array([i])) for i in range(5)]
    done: list[int] = []
    found = Server(fake.address).generate(requests, SAMPLING, "default", done.append)
    assert [r.ids.tolist() for r in found] == [[i] for i in range(5)] and sum(done) == 5


def test_other_weights_than_those_that_were_sent_are_refused(fake: FakeVllm):
    with pytest.raises(ServiceError, match="weights default instead of mine-1"):
        Server(fake.address).generate([REQUEST], SAMPLING, "mine-1", ignore)


@pytest.mark.parametrize(
    ("answer", "message"),
    [((0, None), "does not answer"), ((500, {"error": {"message": "out of luck"}}), "out of luck")],
)
def test_a_server_that_fails_is_one_message(fake: FakeVllm, answer: Any, message: str):
    fake.answers["/inference/v1/generate"] = answer
    with pytest.raises(ServiceError, match=message) as caught:
        Server(fake.address).generate([REQUEST] * 3, SAMPLING, "default", ignore)
    assert caught.value.exit_code == 2 and "--resume" in (caught.value.hint or "")


# checks before a model is loaded


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda f: f.answers.update({"/version": {"version": "0.31.2"}}), ["0.31.2", "0.32 or"]),
        (lambda f: f.answers.update({"/version": (404, {})}), ["no vLLM server"]),
        (lambda f: f.answers.update({"/server_info": (404, {})}), ["development mode"]),
        (
            lambda f: f.answers.update({"/inference/v1/generate": (403, {"message": "disabled"})}),
            ["token ids: disabled"],
        ),
        (
            lambda f: f.altered(
                model_config={"max_model_len": 16, "logprobs_mode": "raw_logprobs"},
                weight_transfer_config=None,
                scheduler_config={"enable_chunked_prefill": True},
            ),
            ["16 tokens", "max-model-len 40", "by nothing", "processed_logprobs", "chunked"],
        ),
        (lambda f: f.altered(weight_transfer_config={"backend": "sharded_rdt"}), ["sharded_rdt"]),
        (lambda f: f.altered(weight_transfer_config={"backend": "nccl"}), ["has no GPU"]),
    ],
)
def test_a_server_that_does_not_fit_is_refused(fake: FakeVllm, change: Any, messages: list[str]):
    check_vllm(settings(fake, temperature=0.7), max_length=40)
    change(fake)
    with pytest.raises(DenserlError) as caught:
        check_vllm(settings(fake, temperature=0.7), max_length=40)
    said = f"{caught.value.message} {caught.value.hint}"
    assert all(message in said for message in messages), said


def test_nobody_at_the_address():
    with pytest.raises(DenserlError, match="does not answer") as caught:
        check_vllm(RolloutConfig(engine="vllm", server="http://127.0.0.1:9"), max_length=8)
    assert "ppo.rollout.server" in (caught.value.hint or "")


def test_no_vllm_or_an_old_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DenserlError, match="not installed") as caught:
        check_vllm(RolloutConfig(engine="vllm"), max_length=8)
    assert "denserl[vllm]" in (caught.value.hint or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
    with pytest.raises(DenserlError, match=r"vLLM 0\.11\.0 is installed; 0\.32 or newer"):
        check_vllm(RolloutConfig(engine="vllm"), max_length=8)


def test_a_cache_that_does_not_fit_is_refused_before_anything_starts():
    with pytest.raises(DenserlError, match="the cache of one response") as caught:
        vllm_process.VllmProcess(
            RolloutConfig(engine="vllm", memory_share=1e-9),
            tiny.config(),
            dtype=torch.float32,
            max_length=64,
        )
    assert "ppo.rollout.memory_share" in (caught.value.hint or "")


def test_the_cause_of_a_failed_start_is_found_in_the_log(tmp_path: Path):
    process = object.__new__(vllm_process.VllmProcess)
    process.log = tmp_path / "log"
    process.log.write_text(
        "(EngineCore pid=9) ERROR 11-30 21:03:19 [core.py:9] Traceback (most recent call last):\n"
        "(EngineCore pid=9) ERROR 11-30 21:03:19 [core.py:9] ValueError: Head size 16 is not it\n"
        "(APIServer pid=8) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert process.cause() == "ValueError: Head size 16 is not it"
    process.log.write_text(
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, User-specified max_model_len (512) is greater than 256\n"
    )
    assert "max_model_len (512)" in process.cause()
    assert "ppo.max_prompt_length" in vllm_process.remedy(process.cause())


# weights


def everything(model: torch.nn.Module, limit: int = 2**29) -> dict[str, torch.Tensor]:
    buckets = list(weight_buckets(tiny.frozen(model), torch.float32, limit))
    found: dict[str, torch.Tensor] = {}
    for bucket in buckets:
        assert not found.keys() & bucket.keys()
        found |= bucket
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_buckets_hold_every_weight_of_the_checkpoint_and_a_tied_head(tied: bool, tmp_path: Path):
    model = tiny.causal_lm(tied=tied)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    if tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    found = everything(model, limit=4096)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_bucket_is_bounded_but_for_a_weight_that_is_larger():
    model = tiny.causal_lm()
    buckets = list(weight_buckets(tiny.frozen(model), torch.bfloat16, 1024))
    largest = max(weight.numel() * 2 for weight in model.parameters())
    sizes = [sum(w.nbytes for w in bucket.values()) for bucket in buckets]
    assert len(buckets) > 3 and max(sizes) <= max(1024, largest)
    assert all(w.dtype == torch.bfloat16 for bucket in buckets for w in bucket.values())


def test_adapters_are_merged():
    model = tiny.causal_lm()
    plain = everything(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    changed = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            scale = module.scaling["default"]
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            changed[f"{name}.weight"] = plain[f"{name}.weight"] + scale * b @ a
    found = everything(model)
    assert found.keys() == plain.keys() and len(changed) == 4
    for name, weight in found.items():
        torch.testing.assert_close(weight, changed.get(name, plain[name]))


# transfers


class Recorder:
    """A `post` that remembers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        self.asked.append((path, body))
        if "path" in body.get("update_info", {}):
            self.read = load_file(body["update_info"]["path"])
        return {}


BUCKET = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(8)[:4]}


def test_a_file_is_read_and_gone(tmp_path: Path):
    post = Recorder()
    transfer = FileTransfer(post, tmp_path)
    transfer.connect()
    transfer.send(BUCKET)
    assert [path for path, _ in post.asked] == ["/init_weight_transfer_engine", "/update_weights"]
    assert all(torch.equal(post.read[name], weight) for name, weight in BUCKET.items())
    assert not list(tmp_path.iterdir())


def test_nccl_broadcasts_in_the_order_that_the_server_is_told(monkeypatch: pytest.MonkeyPatch):
    from torch.cuda import nccl

    log: list[Any] = []
    monkeypatch.setattr(nccl, "unique_id", lambda: bytes(128))
    monkeypatch.setattr(nccl, "init_rank", lambda size, unique, rank: ("comm", size, rank))
    monkeypatch.setattr(nccl, "all_reduce", lambda inputs, comms: log.append(("sum", comms)))
    monkeypatch.setattr(
        nccl, "broadcast", lambda inputs, comms: log.append((tuple(inputs[0].shape), comms))
    )
    ones, stream = torch.ones, type("Stream", (), {"synchronize": lambda self: None})
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    post = Recorder()
    transfer = NcclTransfer(post, workers=2)
    transfer.connect()
    transfer.send(BUCKET)
    paths = [path for path, _ in post.asked]
    assert paths == [
        "/shutdown_weight_transfer_engine",
        "/init_weight_transfer_engine",
        "/update_weights",
    ]
    info = post.asked[1][1]["init_info"]
    assert (info["world_size"], info["rank_offset"], info["packed"]) == (3, 1, False)
    assert base64.b64decode(info["nccl_unique_id_b64"]) == bytes(128)
    comm = [("comm", 3, 0)]
    assert log == [("sum", comm), ((3, 2), comm), ((4,), comm)]
    told = post.asked[2][1]["update_info"]
    assert told["names"] == ["a", "b"] and told["shapes"] == [[3, 2], [4]]
    assert told["dtype_names"] == ["float32", "float32"]


def test_ipc_sends_a_handle_for_each_weight(monkeypatch: pytest.MonkeyPatch):
    from torch.multiprocessing import reductions

    stream = type("Stream", (), {"synchronize": lambda self: None})
    monkeypatch.setattr(reductions, "reduce_tensor", lambda w: (None, tuple(w.shape)))
    gpu = type("Gpu", (), {"uuid": "GPU-1"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    post = Recorder()
    transfer = IpcTransfer(post)
    transfer.connect()
    transfer.send(BUCKET)
    info = post.asked[1][1]["update_info"]
    handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
    assert handles == [{"GPU-1": (3, 2)}, {"GPU-1": (4,)}] and info["names"] == ["a", "b"]


# the engine


def engine(fake: FakeVllm, **fields: Any) -> VllmSampling:
    policy = tiny.frozen(tiny.causal_lm())
    return NoProbe(policy, settings(fake, **fields), pad_id=0, max_length=40)


def test_weights_go_over_once_for_each_refresh(fake: FakeVllm):
    sampling = engine(fake)
    sampling.refresh()
    for _ in range(2):
        sampling.sample([REQUEST], SAMPLING, ignore)
    sampling.refresh()
    sampling.sample([], SAMPLING, ignore)
    sampling.close()
    paths = [path for path, _ in fake.asked][4:]
    update = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    update += ["/reset_prefix_cache", "/resume"]
    generate = "/inference/v1/generate"
    assert paths == ["/init_weight_transfer_engine", *update, generate, generate, *update]
    versions = [b["weight_version"] for p, b in fake.asked if p == "/finish_weight_update"]
    assert len(set(versions)) == 2


def test_an_update_that_a_dead_job_began_is_ended_first(fake: FakeVllm):
    tries = iter([(500, {"error": "already active"}), {}])
    fake.answers["/start_weight_update"] = lambda body: next(tries)
    engine(fake).sample([REQUEST], SAMPLING, ignore)
    paths = [path for path, _ in fake.asked]
    begun = paths.index("/start_weight_update")
    assert paths[begun : begun + 3] == [
        "/start_weight_update",
        "/finish_weight_update",
        "/start_weight_update",
    ]


def test_weights_that_are_not_taken_name_the_model(fake: FakeVllm):
    fake.answers["/update_weights"] = (500, {"error": {"message": "no module lm_head"}})
    with pytest.raises(DenserlError, match="no module lm_head") as caught:
        engine(fake).sample([REQUEST], SAMPLING, ignore)
    assert "some/model" in (caught.value.hint or "")


def test_a_cache_that_is_not_emptied_is_an_error(fake: FakeVllm):
    fake.answers["/reset_prefix_cache"] = {"success": False}
    with pytest.raises(ServiceError, match="prefix cache"):
        engine(fake).sample([REQUEST], SAMPLING, ignore)


def test_a_server_with_another_model_is_found_out(fake: FakeVllm):
    policy = tiny.frozen(tiny.causal_lm())
    sampling = VllmSampling(policy, settings(fake), pad_id=0, max_length=40)
    with pytest.raises(DenserlError, match="do not compute the same") as caught:
        sampling.sample([REQUEST], SAMPLING, ignore)
    assert "some/model" in (caught.value.hint or "")


def test_several_processes_sample_from_one_server_and_fail_together(fake: FakeVllm, tmp_path: Path):
    """One of them sends the weights; an error of one is that of both, and nobody waits for ever."""

    def generate(body: Any) -> Any:
        long = len(body.get("token_ids", ())) > 3
        return (500, {"error": {"message": "too long"}}) if long else fake.generate(body)

    fake.answers["/inference/v1/generate"] = generate
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = str(Path(__file__).with_name("vllm_worker.py"))
    command = [sys.executable, *launcher, worker, fake.address, str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(2)]
    assert both[0] == both[1] and both[0]["drawn"] == [[7, 8, 5]] * 5
    assert "too long" in both[0]["failed"]
    assert [path for path, _ in fake.asked].count("/start_weight_update") == 1


# the job around it


@pytest.mark.parametrize("number", [4, 5], ids=["rollout", "evaluation"])
def test_a_lost_server_keeps_the_state(scored: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """Samplings in order: evaluation, iterations 1 and 2, evaluation, iteration 3, …."""
    options = ("ppo.save_every=100", "ppo.eval_every=3" if number == 5 else "ppo.eval_every=2")
    whole = copied(scored, "whole")
    train(whole, *options)
    calls, real = [], Sampler.sample

    def sample(*words: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise ServiceError("the server is gone", hint="start it again")
        return real(*words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", sample)
        with pytest.raises(ServiceError, match=r"gone\nstopped after iteration \d of 4"):
            train(scored, *options)
    train(scored, *options, mode="resume")
    assert outcome(scored)["policy"] == outcome(whole)["policy"]


def test_a_nucleus_is_corrected_and_recorded(scored: Path):
    train(scored, "ppo.rollout.top_p=0.6", "ppo.iterations=1")
    (line,) = [one for one in outcome(scored)["metrics"] if "mismatch_kl" in one]
    assert line["mismatch_kl"] > 0.01 and line["importance_mean"] < 1
    assert line["importance_capped"] == 0


def test_the_default_correction():
    assert RolloutConfig().correction == "none"
    assert RolloutConfig(top_p=0.9).correction == "token"
    assert RolloutConfig(engine="vllm").correction == "token"
    assert replace(RolloutConfig(engine="vllm"), importance="none").correction == "none"


def test_a_killed_owner_leaves_nothing_behind(tmp_path: Path):
    mark = tmp_path / "pid"
    child = f"import os,time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    keeper = [sys.executable, "-m", "denserl_cli.core.sampling.vllm_keeper"]
    keeper += [sys.executable, "-c", child]
    owner = (
        "import subprocess, sys, time; subprocess.Popen("
        f"{keeper!r}, stdin=subprocess.PIPE); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner])
    until = time.monotonic() + 30
    while not (mark.exists() and mark.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _runs(int(mark.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(int(mark.read_text()))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
