from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from denserl_cli.core import likelihood
from denserl_cli.core.likelihood import logprob_and_entropy


def full(hidden, weight, targets, temperature=1.0):
    """The plain computation with all logits at once."""
    logits = hidden.double() @ weight.double().T / temperature
    log_p = logits.log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def case(count=13, vocabulary=37, width=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (count,), generator=generator)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of five tokens by at most eleven of the vocabulary at H = 8; none divides evenly."""
    for device in ("", "CUDA_"):
        monkeypatch.setattr(likelihood, f"{device}TILE_TOKENS", 5)
        monkeypatch.setattr(likelihood, f"{device}TILE_BYTES", 11 * 8 * 4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_full_logits(small_tiles, dtype, temperature):
    hidden, weight, targets = case(dtype=dtype)
    logprob, entropy = logprob_and_entropy(hidden, weight, targets, temperature=temperature)
    assert logprob.dtype == entropy.dtype == torch.float32
    expected = full(hidden, weight, targets, temperature)
    torch.testing.assert_close(logprob.double(), expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=2e-5)

    slopes = torch.linspace(-1, 2, len(targets)), torch.linspace(1, -1, len(targets))
    inputs = (hidden, weight)
    streamed = torch.autograd.grad((logprob, entropy), inputs, slopes)
    plain = torch.autograd.grad(expected, inputs, [slope.double() for slope in slopes])
    rounding = 1e-5 if dtype == torch.float32 else 8e-3
    for ours, theirs in zip(streamed, plain, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=3e-5)


def test_gradcheck_in_float64(small_tiles):
    hidden, weight, targets = case(7, 13, 3, torch.float64)

    def run(hidden, weight):
        return logprob_and_entropy(hidden, weight, targets, temperature=1.3)

    assert torch.autograd.gradcheck(run, (hidden, weight))


@pytest.mark.parametrize("output", [0, 1])
def test_each_output_is_differentiable_alone(small_tiles, output):
    hidden, weight, targets = case()
    inputs = (hidden, weight)
    ours = torch.autograd.grad(logprob_and_entropy(hidden, weight, targets)[output].sum(), inputs)
    plain = torch.autograd.grad(full(hidden, weight, targets)[output].sum(), inputs)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)


def test_entropy_can_be_left_out():
    hidden, weight, targets = case()
    with_it, _ = logprob_and_entropy(hidden, weight, targets)
    logprob, entropy = logprob_and_entropy(hidden, weight, targets, with_entropy=False)
    assert entropy is None
    assert torch.equal(logprob, with_it)
    assert torch.autograd.grad(logprob.sum(), hidden)[0].abs().sum() > 0


def test_no_tokens():
    hidden, weight, targets = case(count=0)
    logprob, entropy = logprob_and_entropy(hidden, weight, targets)
    assert logprob.shape == entropy.shape == (0,)
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 8)
    assert not weight.grad.any()


@pytest.fixture(params=[4, 2**20], ids=["a tile for each token", "one tile"])
def tile_bytes(request, monkeypatch):
    monkeypatch.setattr(likelihood, "TILE_BYTES", request.param)


def test_impossible_and_very_unlikely_tokens_add_nothing_to_the_entropy(tile_bytes):
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[-torch.inf], [-1e30], [0.0], [-torch.inf], [0.0], [-1e30]])
    logprob, entropy = logprob_and_entropy(hidden, weight, torch.tensor([4]))
    assert logprob.item() == pytest.approx(-0.6931472)
    assert entropy.item() == pytest.approx(0.6931472)


def test_gradient_beside_very_unlikely_tokens_is_finite(tile_bytes):
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[-1e30], [0.0], [1.0], [-1e30]])
    _, entropy = logprob_and_entropy(hidden, weight, torch.tensor([2]))
    (1e20 * entropy).backward()
    # Two tokens, z = (0, h): dH/dh = -h p (1 - p) with p = sigmoid(h), here at h = 1.
    assert hidden.grad.item() == pytest.approx(-1e20 * 0.1966119, rel=1e-5)


def test_autocast_does_not_round_the_logits():
    hidden, weight, targets = case()
    plain = logprob_and_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logprob_and_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(cast[1].sum(), (hidden, weight))
    assert torch.equal(cast[0], plain[0])
    assert torch.equal(cast[1], plain[1])
    assert torch.equal(gradients[0], torch.autograd.grad(plain[1].sum(), hidden)[0])


def test_nothing_is_kept_when_nothing_is_trained():
    hidden, weight, targets = case()
    logprob, entropy = logprob_and_entropy(hidden.detach(), weight.detach(), targets)
    assert logprob.grad_fn is None
    assert entropy.grad_fn is None


def test_only_the_head_is_trained():
    hidden, weight, targets = case()
    logprob, _ = logprob_and_entropy(hidden.detach(), weight, targets)
    (ours,) = torch.autograd.grad(logprob.sum(), weight)
    (plain,) = torch.autograd.grad(full(hidden, weight, targets)[0].sum(), weight)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_iter(result) if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_120_000_never_makes_a_large_tensor(dtype):
    count, vocabulary, width = 512, 120_000, 32
    hidden, weight, targets = case(count, vocabulary, width, dtype)
    weight.requires_grad_(False)
    with Sizes() as made:
        logprob, entropy = logprob_and_entropy(hidden, weight, targets)
        (logprob.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()
    largest = max(torch.Size(shape).numel() for shape in made.shapes)
    assert vocabulary < largest < count * vocabulary / 4
    assert (vocabulary, width) not in made.shapes  # no copy, no gradient of the frozen head
    assert weight.grad is None


def test_half_products_with_float32_results_as_on_cuda(small_tiles, monkeypatch):
    """The CUDA path's bookkeeping, with a stand-in for its mixed-type product."""

    def mixed(left, right, out_dtype, out=None):
        assert left.dtype == right.dtype == torch.bfloat16
        product = left.to(out_dtype) @ right.to(out_dtype)
        return product if out is None else out.copy_(product)

    hidden, weight, _ = case(dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "mm", mixed)
    head = likelihood._Head(hidden, weight, 1.0, operand=torch.bfloat16)
    with torch.no_grad():
        expected = hidden.float() @ weight.float().T
        logits, grad_weight = torch.empty_like(expected), torch.ones(weight.shape)
        grad_states = torch.ones(hidden.shape)
        for tile in head.tiles():
            logits[tile.rows, tile.columns] = tile.logits
            ones = torch.ones_like(tile.logits, dtype=torch.bfloat16)
            head.multiply(ones, tile.weight, grad_states[tile.rows], add=True)
            head.multiply(ones.t(), tile.states, grad_weight[tile.columns], add=True)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(grad_states, 1 + torch.ones_like(logits) @ weight.float())
        torch.testing.assert_close(grad_weight, 1 + torch.ones_like(logits).T @ hidden.float())


def test_cuda_multiplies_in_autocasts_type_where_it_is_on(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    assert likelihood._cuda_operand(torch.float32) == torch.float32
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert likelihood._cuda_operand(torch.float32) == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(small_tiles, dtype):
    hidden, weight, targets = case(dtype=dtype)
    here = logprob_and_entropy(hidden, weight, targets)
    there = logprob_and_entropy(hidden.cuda(), weight.cuda(), targets.cuda())
    for ours, theirs in zip(there, here, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), (hidden, weight))
        for outputs in (here, there)
    ]
    rounding = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*gradients, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("offset", [100.0, -1000.0])
@pytest.mark.parametrize("output", [0, 1])
def test_logits_far_from_0_cost_the_gradient_no_digits(small_tiles, offset, output):
    """A normaliser rounded to the logits' size would leave probabilities that do not sum to 1."""
    hidden, weight, targets = case()
    ones, offsets = torch.ones(len(hidden), 1), torch.full((len(weight), 1), offset)
    hidden = torch.cat((hidden.detach(), ones), 1).requires_grad_()
    weight = torch.cat((weight.detach(), offsets), 1)
    losses = (f(hidden, weight, targets)[output].sum() for f in (logprob_and_entropy, full))
    ours, plain = (torch.autograd.grad(loss, hidden)[0] for loss in losses)
    torch.testing.assert_close(ours, plain, rtol=0, atol=5e-6 * abs(offset))


def test_a_target_outside_the_vocabulary_is_no_number(small_tiles):
    hidden, weight, targets = case()
    targets[2], targets[7] = -100, len(weight)
    logprob, entropy = logprob_and_entropy(hidden, weight, targets)
    assert logprob.isnan().nonzero().flatten().tolist() == [2, 7]
    assert entropy.isfinite().all()
