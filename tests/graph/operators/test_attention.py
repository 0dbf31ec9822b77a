"""A BatchNorm behind attention goes into what computes the values, by heads and channels."""

import pytest
import torch
import torch.nn.functional as F
from networks import batch_norms, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.norms.pointwise.channel_affine import ChannelShift

X = torch.randn(2, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Self-attention over the positions of an image, two heads, then a BatchNorm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv = how, nn.Conv2d(6, 3 * 8, 1)
        self.drop, self.bn, self.head = nn.Dropout(0.1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 3, 2, 4, h * w).transpose(-1, -2).unbind(1)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "softmax":
            y = self.drop((q @ k.transpose(-1, -2)).softmax(-1)) @ v
        else:
            y = torch.sigmoid(q @ k.transpose(-1, -2)) @ v
        y = y.transpose(-1, -2).reshape(n, 8, h, w)
        return F.relu(self.head(F.relu(self.bn(y))))


@pytest.mark.parametrize(("how", "left"), [("fused", []), ("softmax", []), ("sigmoid", ["bn"])])
def test_it_folds_where_the_weights_of_the_sum_add_up_to_one(how: str, left: list[str]) -> None:
    model = randomise(Attention(how)).double()
    folded = ns.fold(model, X)
    assert batch_norms(folded) == left
    assert all(type(folded.get_submodule(name)) is ChannelShift for name in left)
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-10
    queries_and_keys = model.qkv.weight[:16], folded.qkv.weight[:16]
    assert torch.equal(*queries_and_keys)


class Masked(nn.Module):
    """Attention with a mask that is given, then a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.bn = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, self.values(x), attn_mask=mask)
        return self.bn(y.transpose(1, 2))


def test_a_mask_may_leave_nothing_to_attend_to() -> None:
    x, mask = X.flatten(2).transpose(1, 2), torch.ones(25, 25, dtype=torch.bool)
    model = randomise(Masked()).double()
    folded = ns.fold(model, (x, mask))
    for rows in (0, 3):  # that many see nothing, and torch gives 0 for them
        mask[:rows] = False
        assert error(in_eval(folded, x, mask), in_eval(model, x, mask)) <= 1e-10


def test_values_that_are_the_keys_as_well_stop_it() -> None:
    class Tied(Masked):
        def forward(self, x: Tensor) -> Tensor:
            keys = self.values(x)
            y = F.scaled_dot_product_attention(x[..., :4], keys, keys)
            return self.bn(y.transpose(1, 2))

    model, x = randomise(Tied()).double(), X.flatten(2).transpose(1, 2)
    folded = ns.fold(model, x)
    assert batch_norms(folded) == ["bn"]
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10


def test_a_product_that_is_broadcast_stops_it() -> None:
    """Values of one head for the queries of all: a lambda layer (arXiv 2102.08602)."""

    class Lambda(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.values = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 3, 1)
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            n, _, h, w = x.shape
            queries = self.queries(x).view(n, 2, 4, h * w).transpose(-1, -2)
            values = self.values(x).flatten(2)[..., :4].transpose(-1, -2).unsqueeze(1)
            return self.bn((queries @ values).transpose(-1, -2).reshape(n, 6, h, w))

    model = randomise(Lambda()).double()
    folded = ns.fold(model, X)
    assert batch_norms(folded) == ["bn"]
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-10


def test_active_dropout_stops_it_in_tune_mode() -> None:
    model = randomise(Attention("softmax")).double()
    reason = str(ns.plan(model, ns.Freeze("tune"), inputs=X))
    assert "stays a module" in reason
