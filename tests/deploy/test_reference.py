"""The copy of a model that files are held against: no memory for the weights, and no trace."""

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.deploy.reference_run import bind, reference_copy


def test_the_copy_has_the_weights_in_common_with_the_model_and_nothing_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    twin = reference_copy(model, bind(model, torch.randn(2, 3, 8, 8)))
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert mine is not theirs and mine.data_ptr() == theirs.data_ptr()
    for mine, theirs in zip(twin.buffers(), model.buffers(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
    before = model[0].weight.dtype
    twin.double()[0].weight.sum().backward()
    assert model[0].weight.dtype == before and model[0].weight.grad is None


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class Renormalized(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.long().clamp(0, 5))


WRITING = {
    "max_norm": lambda: Renormalized(6, 4, max_norm=0.5),
    "clamp_": lambda: Clamped(4, 4),
}


@pytest.mark.parametrize("kind", WRITING)
def test_a_forward_that_writes_into_its_weights_does_not_reach_those_of_the_model(
    kind: str,
) -> None:
    model, x = WRITING[kind](), torch.arange(4.0).view(1, 4)
    before = model.weight.detach().clone()
    twin = reference_copy(model, bind(model, x))
    assert torch.equal(model.weight, before)
    twin(x)
    assert not torch.equal(twin.weight, before)
    assert torch.equal(model.weight, before)


def test_validation_changes_no_weight_of_a_model_that_writes_into_them(tmp_path) -> None:
    model, x = Clamped(4, 4), torch.randn(2, 4)
    with torch.no_grad():
        model.weight.clamp_(-0.1, 0.1)
    plain = nn.Linear(4, 4)
    plain.load_state_dict(model.state_dict())
    ns.export(plain, x, tmp_path / "m.onnx", validate=False)
    with torch.no_grad():
        model.weight.mul_(1.5)
    before = model.weight.detach().clone()
    assert ns.validate(tmp_path / "m.onnx", model, x).cases
    assert torch.equal(model.weight, before)
