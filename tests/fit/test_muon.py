"""Muon: its direction is that of the singular vectors, its length that of the weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from normswap.fit.muon import Muon, muon_groups, orthogonalized

SIZES = st.integers(1, 24)


def stepped(model: nn.Module, grads: list[Tensor], lr: float = 0.1) -> nn.Module:
    optimizer = Muon(muon_groups(model), lr=lr)
    for scale in (1.0, 0.5):
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad * scale
        optimizer.step()
    return model


@given(SIZES, SIZES, st.integers(0, 1000))
def test_singular_vectors_stay_and_singular_values_are_near_one(
    rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(full, full_matrices=False)
    values = torch.linspace(1.0, 0.1, len(vt), dtype=torch.float64)
    found = orthogonalized((u * values @ vt)[None])[0].double()
    inside = u.T @ found @ vt.T  # diagonal, if the singular vectors are the same
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-4
    assert inside.diagonal().min() > 0.65 and inside.diagonal().max() < 1.25


@given(st.floats(0.1, 1e3), st.integers(0, 100))
def test_a_step_does_not_depend_on_the_scale_of_the_loss(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 4))
    grads = [torch.randn_like(parameter) for parameter in first.parameters()]
    second = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 4))
    second.load_state_dict(first.state_dict())
    stepped(first, grads)
    stepped(second, [grad * scale for grad in grads])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
def test_the_first_step_is_as_long_as_asked_of_the_weights_norm(norm: float) -> None:
    weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    with torch.no_grad():
        weight *= norm / weight.norm()
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    Muon([{"params": [weight], "lr": 0.03, "blocks": 1}], lr=0.03).step()
    assert (weight - before).norm().item() == pytest.approx(0.03 * norm, rel=1e-4)


@pytest.mark.parametrize(("values", "size"), [(2.0, 2.0), (0.0, 0.1)])
def test_vectors_take_the_step_of_adam_times_their_size(values: float, size: float) -> None:
    ours, theirs = (nn.Parameter(torch.full((5,), values)) for _ in range(2))
    grad = torch.randn(5)
    muon = Muon([{"params": [ours], "blocks": 0}], lr=0.01)
    adam = torch.optim.Adam([theirs], lr=0.01 * size, betas=(0.9, 0.99))
    ours.grad = theirs.grad = grad
    muon.step()
    adam.step()
    torch.testing.assert_close(ours, theirs)


def test_each_group_of_a_convolution_is_a_matrix_of_its_own() -> None:
    torch.manual_seed(0)
    whole = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    grad = torch.randn_like(whole.weight)
    before = whole.weight.detach().clone()
    stepped(whole, [grad])
    step = (whole.weight.detach() - before).view(2, 2, -1)
    alone = torch.stack([orthogonalized(each[None])[0] for each in grad.view(2, 2, -1)])
    # Both steps have this direction, as the second gradient is half the first.
    torch.testing.assert_close(step / step.norm(), -alone / alone.norm(), rtol=1e-3, atol=1e-4)


def test_parameters_that_do_not_train_are_in_no_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    groups = muon_groups(model)
    held = {id(p) for group in groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert [group["blocks"] for group in groups] == [0]
