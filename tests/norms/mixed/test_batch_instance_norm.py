"""The gate of batch-instance normalization: what it weighs, and that it stays in [0, 1]."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import error

import normswap as ns
from normswap.norms.mixed.batch_instance import BatchInstanceNorm, keep_gates


def gated(value: float, channels: int = 3) -> BatchInstanceNorm:
    module = BatchInstanceNorm(channels).double()
    with torch.no_grad():
        module.gate.fill_(value)
    return module


@pytest.mark.parametrize("training", [True, False])
def test_a_gate_of_one_is_batch_norm_and_of_zero_instance_norm(training: bool) -> None:
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64) + 2
    statistics = torch.zeros(3).double(), torch.ones(3).double()
    batch = F.batch_norm(x, *(each.clone() for each in statistics), training=training)
    torch.testing.assert_close(gated(1).train(training)(x), batch)
    torch.testing.assert_close(gated(0).train(training)(x), F.instance_norm(x))


def test_it_starts_as_batch_norm() -> None:
    assert torch.equal(ns.create("batch_instance_norm", 5).gate, torch.ones(5))


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 3.0, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.7}),
        (torch.optim.AdamW, {"lr": 0.7}),
    ],
)
def test_no_optimizer_uses_a_gate_outside_its_range(
    optimizer: Any, options: dict[str, Any], start: float
) -> None:
    module, x = gated(start), torch.randn(4, 3, 6, 5, dtype=torch.float64)
    target = torch.randn_like(x) * 3
    step, seen = optimizer(module.parameters(), **options), []
    for _ in range(8):
        loss = (module(x) - target).square().mean()
        assert 0 <= module.gate.min() <= module.gate.max() <= 1
        step.zero_grad()
        loss.backward()
        step.step()
        seen.append(module.gate.detach().clone())
    assert any((gate < 0).any() or (gate > 1).any() for gate in seen)  # what had to be clipped
    assert len({tuple(gate.clamp(0, 1).tolist()) for gate in seen}) > 1  # and it still learns


@pytest.mark.parametrize(("outside", "bound"), [(1.3, 1.0), (-0.4, 0.0)])
def test_a_gate_outside_counts_as_the_nearest_bound(outside: float, bound: float) -> None:
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    for training in (True, False):
        module, clipped = gated(outside).train(training), gated(bound).train(training)
        torch.testing.assert_close(module(x), clipped(x))
    module, clipped = gated(outside), gated(bound)
    (module(x) * x).sum().backward()
    (clipped(x) * x).sum().backward()
    torch.testing.assert_close(module.gate.grad, clipped.gate.grad)
    assert clipped.gate.grad.abs().min() > 0
    assert torch.equal(module.gate, clipped.gate)  # clipped in place


def test_a_module_used_twice_in_a_step_can_be_trained() -> None:
    module, x = gated(1.2), torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    module(module(x)).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_large_means_do_not_cancel() -> None:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64) + 1e4
    exact = gated(0.5)(x)
    assert error(gated(0.5).float()(x.float()).double(), exact) < 5e-3


def test_training_exports_and_a_functional_call_writes_to_no_gate() -> None:
    module, x = BatchInstanceNorm(3).train(), torch.randn(4, 3, 5)
    gate = torch.tensor([-1.0, 0.5, 2.0])
    with torch.no_grad():
        module.gate.copy_(gate)
    program = torch.export.export(module, (x,))
    state = {"gate": gate}
    y = torch.func.functional_call(module, state, (x,))
    assert torch.equal(gate, torch.tensor([-1.0, 0.5, 2.0]))
    torch.testing.assert_close(program.module()(x), y)
    torch.testing.assert_close(module(x), y)
    assert module.gate.tolist() == [0, 0.5, 1]


def test_gates_are_kept_in_bounds_after_each_step() -> None:
    norm = BatchInstanceNorm(4)
    optimizer = torch.optim.SGD(norm.parameters(), lr=10.0)
    handle = keep_gates(norm, optimizer)
    reached = set()
    for sign in (1, -1, 1, -1):
        optimizer.zero_grad()
        norm.gate.grad = torch.full((4,), 5.0 * sign)
        optimizer.step()
        assert norm.gate.min() >= 0
        assert norm.gate.max() <= 1
        reached.add(norm.gate[0].item())
    assert reached == {0.0, 1.0}
    handle.remove()
    norm.gate.grad = torch.full((4,), -5.0)
    optimizer.step()
    assert norm.gate.min() > 1
