"""What an output is decides how it is compared; the comparisons are those of torch."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from normswap.core.errors import NormswapError
from normswap.fit.outputs import Part, parts_of, tensors_in
from normswap.graph.capture import capture

CLASSES = 6
X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A convolution to 5 channels, and a `head` that makes an output of them."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, CLASSES)
        self.pixel, self.image = nn.Conv2d(5, CLASSES, 1), nn.Conv2d(5, 3, 1)
        self.head = head
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1.5, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> Any:
        return self.head(self, self.conv(x))


def pooled(m: Model, y: Tensor) -> Tensor:
    logits: Tensor = m.linear(y.amax((2, 3)))
    return logits - logits.mean(0)


def tokens(m: Model, y: Tensor) -> Tensor:
    logits: Tensor = m.linear(y.flatten(2).mT)
    return logits


def anchors(m: Model, y: Tensor) -> Tensor:
    """As SSD and RetinaNet join what they say of two anchors at each place of maps of two sizes."""
    maps = [m.pixel(each).unflatten(1, (2, 3)) for each in (y, F.max_pool2d(y, 2))]
    return torch.cat([each.permute(0, 3, 4, 1, 2).flatten(1, 3) for each in maps], 1)


class Two(NamedTuple):
    scores: Tensor
    boxes: Tensor


@dataclass
class Both:
    logits: Tensor
    hidden: Tensor
    cache: Any = None


def named(parts: tuple[Part, ...]) -> dict[str, tuple[str, int]]:
    return {part.name: (part.kind, part.axis) for part in parts}


HEADS: dict[str, tuple[Any, dict[str, tuple[str, int]]]] = {
    "logits": (pooled, {"": ("logits", -1)}),
    "probabilities": (lambda m, y: pooled(m, y).softmax(1), {"": ("probabilities", -1)}),
    "log-probabilities": (
        lambda m, y: F.log_softmax(pooled(m, y), 1),
        {"": ("log-probabilities", -1)},
    ),
    "a sigmoid": (lambda m, y: torch.sigmoid(pooled(m, y)), {"": ("binary probabilities", -1)}),
    "a sigmoid of an image": (
        lambda m, y: m.image(y).sigmoid().permute(0, 2, 3, 1),
        {"": ("binary probabilities", -1)},
    ),
    "segmentation": (
        lambda m, y: {"out": F.interpolate(m.pixel(y), scale_factor=2), "aux": m.pixel(y)},
        {"out": ("logits", -3), "aux": ("logits", -3)},
    ),
    "a sequence": (tokens, {"": ("logits", -1)}),
    "a sequence, channels first": (lambda m, y: m.pixel(y).flatten(2), {"": ("logits", -2)}),
    "anchors": (anchors, {"": ("logits", -1)}),
    "an image": (lambda m, y: m.image(y), {"": ("values", -3)}),
    "one value": (lambda m, y: m.linear(y.amax((2, 3)))[:, :1], {"": ("values", -1)}),
    "one number": (lambda m, y: m.linear(y.amax((2, 3)))[:, 0], {"": ("values", -1)}),
    "an embedding": (lambda m, y: F.normalize(y.mean((2, 3))), {"": ("values", -1)}),
    "features": (lambda m, y: y.amax((2, 3)).relu() * 9, {"": ("values", -1)}),
    "corners": (
        lambda m, y: Two(pooled(m, y), m.linear(y.amax((2, 3)))[:, :4].exp() * 30),
        {"scores": ("logits", -1), "boxes": ("values", -1)},
    ),
    "an object": (
        lambda m, y: SimpleNamespace(logits=pooled(m, y) / 50),
        {"logits": ("logits", -1)},
    ),
    "a dataclass": (
        lambda m, y: Both(pooled(m, y), y.flatten(2).mT),
        {"logits": ("logits", -1), "hidden": ("values", -1)},
    ),
    "twice the same": (lambda m, y: (F.normalize(y.mean((2, 3))),) * 2, {"0": ("values", -1)}),
}


@pytest.mark.parametrize(("head", "expected"), HEADS.values(), ids=HEADS)
def test_a_kind_is_known(head: Any, expected: dict[str, tuple[str, int]]) -> None:
    teacher, student = Model(head).eval(), Model(head).eval()
    try:
        seen = capture(teacher, X[:2])
    except NormswapError:
        seen = None  # an object that torch.export does not take
    assert named(parts_of(student, teacher, [X[:12], X[12:]], seen)) == expected


def test_without_a_graph_probabilities_are_known_by_their_sum() -> None:
    model = Model(lambda m, y: pooled(m, y).softmax(1)).eval()
    assert named(parts_of(model, model, [X], None)) == {"": ("probabilities", -1)}


def test_labels_of_zeros_and_ones_make_binary_logits() -> None:
    model, y = Model(pooled).eval(), torch.randint(2, (24, CLASSES))
    assert named(parts_of(model, model, [(X, y)], None)) == {"": ("binary logits", -1)}


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("kl", pooled, "logits"),
        ("kl", lambda m, y: pooled(m, y).softmax(1), "probabilities"),
        ("bce", pooled, "binary logits"),
        ("bce", lambda m, y: pooled(m, y).sigmoid(), "binary probabilities"),
        ("mse", pooled, "values"),
        ("cosine", pooled, "directions"),
    ],
)
def test_a_loss_by_name_overrides_it(name: Any, head: Any, kind: str) -> None:
    model = Model(head).eval()
    assert named(parts_of(model, model, [X], None, name)) == {"": (kind, -1)}


def test_classes_are_more_than_one_value() -> None:
    model = Model(lambda m, y: m.linear(y.amax((2, 3)))[:, :1]).eval()
    with pytest.raises(NormswapError, match="kl is for classes; take bce or mse"):
        parts_of(model, model, [X], None, "kl")


def test_what_a_detector_found_is_no_part_of_it() -> None:
    found = [{"boxes": torch.rand(3, 4), "labels": torch.ones(3), "scores": torch.rand(3)}]
    assert tensors_in((found, {"features": X})).keys() == {"1.features"}


def test_a_part_of_another_shape_is_left_out() -> None:
    sizes = iter((3, 4))
    model = Model(lambda m, y: (m.image(y), y.flatten(1)[:, : next(sizes)])).eval()
    assert named(parts_of(model, model, [X], None)) == {"0": ("values", -3)}


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2, 2)])
def test_the_divergences_are_those_of_torchs_distributions(shape: tuple[int, ...]) -> None:
    t, s = torch.randn(2, *shape, dtype=torch.float64) * 3
    p, q = (Categorical(logits=each.movedim(1, -1)) for each in (t, s))
    axis = 1 - len(shape)
    expected = kl_divergence(p, q).mean()
    for kind, change in (
        ("logits", lambda x: x),
        ("log-probabilities", lambda x: x.log_softmax(1)),
        ("probabilities", lambda x: x.softmax(1)),
    ):
        part = Part("", kind, axis)  # type: ignore[arg-type]
        torch.testing.assert_close(part.apart(change(s), change(t)), expected)
        assert float(part.apart(change(t), change(t))) == 0
    several = kl_divergence(Bernoulli(logits=t), Bernoulli(logits=s)).sum(1).mean()
    torch.testing.assert_close(Part("", "binary logits", axis).apart(s, t), several)
    both = (s.sigmoid(), t.sigmoid())
    torch.testing.assert_close(Part("", "binary probabilities", axis).apart(*both), several)


def test_values_are_apart_in_shares_of_their_variance() -> None:
    target = torch.randn(1000, 2, dtype=torch.float64) * torch.tensor([1.0, 100.0])
    part = Part("", "values", -1, target.var(0, correction=0))
    off = target + target.std(0, correction=0) * torch.tensor([0.1, 0.3])
    torch.testing.assert_close(float(part.apart(off, target)), (0.01 + 0.09) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_impossible_classes_stay_finite(dtype: torch.dtype) -> None:
    t, s = torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype).flip(0).requires_grad_()
    for kind in ("probabilities", "binary probabilities"):
        loss = Part("", kind, -1).apart(s, t)  # type: ignore[arg-type]
        loss.backward()
        assert loss.isfinite() and s.grad is not None and s.grad.isfinite().all()
