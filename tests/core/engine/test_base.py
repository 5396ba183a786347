import io
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from denserl_cli.core.engine.base import NonFiniteError, step
from denserl_cli.core.engine.random_state import random_state, restore_random_state, seed_everything
from denserl_cli.core.engine.torch_engine import TorchEngine
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import autocast
from denserl_cli.core.recipe.schema import OptimizerConfig

CPU = torch.device("cpu")


def engine(total: int = 10, dtype: torch.dtype = torch.float32, **settings: float) -> TorchEngine:
    """One linear layer, weights 3 and 4, no bias."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    return TorchEngine(
        layer,
        learning_rate=0.1,
        settings=OptimizerConfig(**settings),  # type: ignore[arg-type]
        total_steps=total,
        compute_dtype=dtype,
    )


def loss(engine: TorchEngine, scale: float = 1.0) -> Tensor:
    """scale * |w|² / 2, with gradient scale * w."""
    return scale * engine.model.weight.square().sum() / 2


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_step_reports_the_norm_and_moves_by_the_clipped_gradient():
    trained = engine(warmup_ratio=0.0, clip_norm=1.0, betas=(0.9, 0.95))
    trained.backward(loss(trained))
    assert step(trained)[0].item() == pytest.approx(5)
    moment = trained.optimizer.state[trained.model.weight]["exp_avg"]
    torch.testing.assert_close(moment, torch.tensor([[0.06, 0.08]]), rtol=1e-4, atol=0)
    # Adam's first step is the learning rate in each coordinate
    torch.testing.assert_close(trained.model.weight.data, torch.tensor([[2.9, 3.9]]))
    assert trained.model.weight.grad is None


def test_gradients_accumulate_until_the_step():
    once, twice = engine(warmup_ratio=0.0), engine(warmup_ratio=0.0)
    once.backward(loss(once))
    for share in (0.25, 0.75):
        twice.backward(loss(twice, share))
    assert step(once) == step(twice)
    assert torch.equal(once.model.weight, twice.model.weight)


def test_the_rate_warms_up_and_follows_a_cosine_to_its_floor():
    trained = engine(total=10, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = []
    for _ in range(11):
        rates.append(trained.learning_rate)
        trained.backward(loss(trained))
        step(trained)
    assert rates[:3] == pytest.approx([0, 0.05, 0.1])
    # half way down: 0.1 * (0.1 + 0.9 * 0.5)
    assert rates[6] == pytest.approx(0.055)
    assert rates[10] == pytest.approx(0.01)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert engine(total=1, warmup_ratio=0.0).learning_rate == 0.1
    assert engine(total=5, warmup_ratio=0.03).learning_rate == 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad: float):
    trained = engine(warmup_ratio=0.0)
    trained.backward(loss(trained))
    step(trained)
    weight, rate = trained.model.weight.clone(), trained.learning_rate
    before = saved_and_loaded(trained.state()["optimizer"])
    trained.backward(loss(trained, bad))
    with pytest.raises(NonFiniteError, match=r"the gradient norm is (nan|inf)"):
        step(trained)
    assert torch.equal(trained.model.weight, weight) and trained.learning_rate == rate
    assert torch.equal(
        trained.state()["optimizer"]["state"][0]["exp_avg"], before["state"][0]["exp_avg"]
    )
    assert trained.model.weight.grad is None


def test_a_restored_engine_goes_on_to_the_same_bits():
    whole = engine()
    for _ in range(4):
        whole.backward(loss(whole))
        step(whole)
    state = saved_and_loaded(whole.state())
    restored = engine()
    restored.restore(state)
    assert restored.learning_rate == whole.learning_rate
    for one in (whole, restored):
        for _ in range(3):
            one.backward(loss(one))
            step(one)
    assert torch.equal(whole.model.weight, restored.model.weight)
    assert whole.learning_rate == restored.learning_rate


def test_shards_of_several_processes_are_refused():
    with pytest.raises(DenserlError, match="of 2 processes under ZeRO 3, this job is one"):
        engine().restore({"processes": 2, "zero_stage": 3})


def test_only_what_asks_for_gradients_is_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    trained = TorchEngine(
        model,
        learning_rate=0.1,
        settings=OptimizerConfig(),
        total_steps=1,
        compute_dtype=torch.float32,
    )
    assert [p.shape for p in trained.parameters] == [p.shape for p in model[1].parameters()]


def test_autocast_is_on_for_bfloat16_alone():
    product = {}
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(CPU, dtype):
            product[dtype] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert product == {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}
    trained = engine(dtype=torch.bfloat16)
    output = trained(lambda model: model(torch.ones(1, 2)))
    assert (output.dtype, trained.model.weight.dtype) == (torch.bfloat16, torch.float32)


def test_random_numbers_go_on_where_they_were_kept():
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(()).item()]

    seed_everything(3)
    first = draw()
    state = saved_and_loaded(random_state())
    then = draw()
    assert draw() != then
    restore_random_state(state)
    assert draw() == then
    seed_everything(3)
    assert draw() == first
