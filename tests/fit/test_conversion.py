"""convert with data: the groups chosen, the swap calibrated, the caller's model as asked."""

import copy

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.core.errors import NormswapError
from normswap.demo.digits import digits, digits_data
from normswap.fit.groups import group_errors
from normswap.fit.reading import first_inputs
from normswap.passes.recipe import recipe_of


@pytest.fixture(scope="module")
def images() -> Tensor:
    return digits_data("train")[0][:100]


@pytest.fixture(scope="module")
def converted(images) -> nn.Module:
    """Not to be changed."""
    return normswap.convert(digits(), "group_norm", data=list(images.split(50)))


def norms(model: nn.Module) -> dict[str, nn.GroupNorm]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}


def test_the_groups_are_those_that_the_data_choose(converted, images):
    candidates = {
        "stem.0.1": [1, 2, 4, 8, 16],
        "residual.bn1": [1, 2, 4, 8, 16, 32],
        "neck.1": [1, 2, 4],  # 64 channels of one value: 16 values a group at least
    }
    errors = group_errors(digits(), candidates, images.split(50))
    for name, error in errors.items():
        assert error[norms(converted)[name].num_groups] == min(error.values())
    reasons = {edit.site: edit.reason for edit in recipe_of(converted).edits}
    assert "squared error with 1, 2, 4 groups: " in reasons["neck.1"]


def test_given_groups_are_kept(images):
    for option in ({"groups": 4}, {"channels_per_group": 16}):
        converted = normswap.convert(digits(), "group_norm", data=[images], **option)
        for norm in norms(converted).values():
            assert norm.num_groups == option.get("groups", norm.num_channels // 16)


def test_auto_without_data_is_the_default_number(images):
    auto = normswap.convert(digits(), "group_norm", inputs=images[:2], groups="auto")
    plain = normswap.convert(digits(), "group_norm", inputs=images[:2])
    numbers = [{n: m.num_groups for n, m in norms(model).items()} for model in (auto, plain)]
    assert numbers[0] == numbers[1]


def test_inplace_gives_the_same_model_as_a_copy(images):
    model = digits()
    copied = normswap.convert(model, "layer_norm", data=[images])
    state = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in digits().state_dict().items())
    assert normswap.convert(model, "layer_norm", data=[images], inplace=True) is model
    torch.testing.assert_close(model(images), copied(images), rtol=0, atol=0)


def test_an_iterator_serves_as_well_as_a_list(converted, images):
    from_iterator = normswap.convert(digits(), "group_norm", data=iter(images.split(50)))
    torch.testing.assert_close(from_iterator(images), converted(images), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["frozen_batch_norm", "sync_batch_norm", "batch_norm"])
def test_an_exact_method_has_nothing_to_fit_and_keeps_the_function(method, images):
    model = digits()
    converted = normswap.convert(model, method, data=[images])
    torch.testing.assert_close(converted.eval()(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_failure_while_calibrating_leaves_an_inplace_model_as_it_was(images):
    model = digits()
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    broken = [images[:50], torch.full_like(images[:50], float("nan"))]
    with pytest.raises(NormswapError, match="not finite"):
        normswap.convert(model, "layer_norm", data=broken, inplace=True)
    assert repr(model) == text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_batch_is_refused():
    with pytest.raises(NormswapError, match="no batch"):
        normswap.convert(digits(), "layer_norm", data=[])


def test_first_inputs_are_of_the_type_of_the_model() -> None:
    model = nn.Linear(3, 2).double()
    batches = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))]
    (x,) = first_inputs(model, batches)
    assert x.dtype == torch.float64 and x.shape == (4, 3)
