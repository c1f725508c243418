"""AdamW on fp32 masters: the same as torch's, no update lost to bf16, warm-up, clipping, exact continuation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ibtpo.config import OptimConfig
from ibtpo.optim import MasterAdamW, NonFiniteGradient


def _network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network.to(dtype)


def _backward(network: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 5, generator=generator).to(next(network.parameters()).dtype)
    (scale * network(x).float().pow(2).sum()).backward()


def _weights(network: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def test_equals_torch_adamw_with_decay_on_matrices_only() -> None:
    ours, theirs = _network(), _network()
    config = OptimConfig(lr=3e-3, beta1=0.8, beta2=0.95, eps=1e-7, weight_decay=0.3, warmup_steps=0, grad_clip=1e9)
    optimizer = MasterAdamW(ours, config)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.95), eps=1e-7)
    for seed in range(12):
        for network in (ours, theirs):
            _backward(network, seed)
        optimizer.step()
        reference.step()
        reference.zero_grad()
    for mine, other in zip(_weights(ours), _weights(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_bf16_weights_move_by_updates_smaller_than_their_rounding() -> None:
    """A step of 1e-6 on a weight of 1 is lost in bf16 (spacing 2**-8) and kept by the fp32 master."""
    config = OptimConfig(lr=1e-6, warmup_steps=0)
    network = _network(torch.bfloat16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
    optimizer = MasterAdamW(network, config)
    for seed in range(20):
        _backward(network, seed)
        optimizer.step()
    moved = [tensor - 1.0 for name, tensor in optimizer.state().items() if name.startswith("master.")]
    assert len(moved) == 3
    assert all(1e-6 < float(change.abs().max()) <= 21e-6 for change in moved)
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in _weights(network))  # not visible yet ...
    plain = torch.ones((), dtype=torch.bfloat16)
    assert plain - 20e-6 == plain  # ... and without masters it never would be

    for _ in range(3):  # a master that moved far enough shows: the weights are its rounding
        optimizer.scale = 1e4
        _backward(network, 0)
        optimizer.step()
    for (name, parameter), master in zip(
        network.named_parameters(),
        (t for n, t in optimizer.state().items() if n.startswith("master.")),
        strict=True,
    ):
        assert torch.equal(parameter, master.to(torch.bfloat16)), name
        assert not torch.equal(parameter, torch.ones_like(parameter)), name


def test_warm_up_rises_linearly_from_a_first_step_above_zero_and_then_stays() -> None:
    network = _network()
    optimizer = MasterAdamW(network, OptimConfig(lr=1e-3, warmup_steps=4))
    rates = []
    for seed in range(6):
        rates.append(optimizer.lr)
        _backward(network, seed)
        optimizer.step()
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    optimizer.scale = 0.1
    assert optimizer.lr == pytest.approx(1e-4)


def test_step_uses_the_rate_of_the_warm_up() -> None:
    """Adam's first step moves every weight by the rate itself, whatever the gradient."""
    network = _network()
    before = _weights(network)
    optimizer = MasterAdamW(network, OptimConfig(lr=1e-2, warmup_steps=10))
    _backward(network, 0)
    optimizer.step()
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(_weights(network), before, strict=True)])
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-3)


def test_clipping_scales_the_gradient_to_the_limit_and_returns_the_norm_before() -> None:
    """After a first step Adam's running mean is (1 - beta1) times the gradient it saw."""
    network, twin = _network(), _network()
    _backward(network, 0, scale=50.0)
    _backward(twin, 0, scale=50.0)
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in twin.parameters()))
    optimizer = MasterAdamW(network, OptimConfig(grad_clip=0.5, beta1=0.9))
    assert optimizer.step() == pytest.approx(norm, rel=1e-5)
    state = optimizer.state()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(state[f"exp_avg.{name}"], 0.1 * parameter.grad * 0.5 / norm, rtol=1e-4, atol=1e-9)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continues_identically_from_its_saved_state(dtype: torch.dtype) -> None:
    config = OptimConfig(lr=1e-2, warmup_steps=6, weight_decay=0.1)
    network = _network(dtype)
    optimizer = MasterAdamW(network, config)
    for seed in range(4):
        _backward(network, seed)
        optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    other = _network(dtype, seed=1)
    other.load_state_dict(network.state_dict())
    resumed = MasterAdamW(other, config)
    resumed.load_state(saved)
    assert resumed.num_steps == 4
    assert resumed.lr == optimizer.lr
    for seed in range(4, 9):
        for model, adam in ((network, optimizer), (other, resumed)):
            _backward(model, seed)
            adam.step()
    for mine, theirs in zip(_weights(network), _weights(other), strict=True):
        assert torch.equal(mine, theirs)
    assert saved["num_steps"] == 4  # what was saved is not shared with what goes on


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(value: float, dtype: torch.dtype) -> None:
    network = _network(dtype)
    optimizer = MasterAdamW(network, OptimConfig(lr=1e-2))
    _backward(network, 0)
    optimizer.step()
    weights = _weights(network)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    _backward(network, 1)
    next(network.parameters()).grad[0, 0] = value
    with pytest.raises(NonFiniteGradient, match=r"optimizer step 2; lower optim\.lr"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, _weights(network), strict=True))
    after = optimizer.state()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert all(parameter.grad is None for parameter in network.parameters())
    _backward(network, 1)  # and the next good gradient is taken
    optimizer.step()
    assert not torch.equal(weights[0], _weights(network)[0])


def test_frozen_parameters_stay() -> None:
    network = _network()
    network[0].weight.requires_grad_(False)
    frozen = network[0].weight.detach().clone()
    optimizer = MasterAdamW(network, OptimConfig(lr=1e-1, weight_decay=0.5))
    _backward(network, 0)
    optimizer.step()
    assert torch.equal(network[0].weight, frozen)
