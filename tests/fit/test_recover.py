"""Recovering: the student comes nearer to its teacher, and nothing else is other than before."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learners import CLASSES, X, batches, loader, net, same_bits
from networks import ConvBN, Detector, randomise
from test_finetune import shape
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit.evaluate import accuracy
from normswap.fit.outputs import Part
from normswap.fit.recover import LR, matched, recovery
from normswap.fit.training import Settings
from normswap.graph.capture import capture
from normswap.graph.snapshot import evaluating

pytestmark = pytest.mark.filterwarnings("ignore:.*which are too few")
UNLABELLED = [x for x, _ in batches()]


def pair(method: str = "layer_norm", **options: Any) -> tuple[nn.Module, nn.Module]:
    teacher = net().eval()
    return ns.convert(teacher, method, inputs=X[:2], **options), teacher


def disagreement(student: nn.Module, teacher: nn.Module) -> float:
    with evaluating(student, teacher):
        return float(Part("", "logits", 1).apart(student(X), teacher(X)))


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2, 2)])
def test_the_divergence_is_that_of_torchs_distributions(shape: tuple[int, ...]) -> None:
    teacher, student = torch.randn(2, *shape, dtype=torch.float64) * 3
    p, q = (Categorical(logits=each.movedim(1, -1)) for each in (teacher, student))
    expected = kl_divergence(p, q).mean()
    torch.testing.assert_close(Part("", "logits", 1).apart(student, teacher), expected)


def test_on_the_bundled_digits_each_step_helps() -> None:
    from normswap.demo.digits import digits, digits_data

    teacher = digits()
    x, _ = digits_data("train")
    test = [digits_data("test")]
    swapped = ns.convert(teacher, "group_norm", inputs=x[:2], groups=16)
    calibrated = ns.calibrate(copy.deepcopy(swapped), teacher, [x[:256]])
    student = copy.deepcopy(swapped)
    ns.recover(student, teacher, x.split(64), steps=40)  # without labels
    plain, fitted, recovered = (accuracy(each, test) for each in (swapped, calibrated, student))
    assert plain < fitted - 0.1 and fitted <= recovered


class Vgg(nn.Sequential):
    """No block: nothing is joined."""

    def __init__(self) -> None:
        super().__init__(
            ConvBN(3, 8), ConvBN(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
        )


class Controlled(nn.Sequential):
    """Cannot be captured whole."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), Detector(), nn.Flatten(), nn.Linear(4 * 36, CLASSES))


@pytest.mark.parametrize("make", [net, Vgg, Controlled])
def test_it_brings_a_student_nearer_than_calibration(make: Any) -> None:
    torch.manual_seed(0)
    teacher = ns.reestimate(randomise(make()), UNLABELLED).eval()
    calibrated = ns.convert(teacher, "layer_norm", inputs=X[:2])
    student = ns.convert(teacher, "layer_norm", inputs=X[:2])
    ns.calibrate(calibrated, teacher, UNLABELLED)
    ns.recover(student, teacher, UNLABELLED, steps=60)
    assert disagreement(student, teacher) < 0.9 * disagreement(calibrated, teacher)


class HuggingFaceLike(nn.Module):
    """Keyword inputs, blocks that return tuples, logits in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.net(pixel_values))


@pytest.mark.parametrize("labelled", [False, True])
def test_dicts_and_logits_in_an_object_do(labelled: bool) -> None:
    teacher = HuggingFaceLike().eval()
    data = [{"pixel_values": x, **({"labels": y} if labelled else {})} for x, y in batches()]
    student = ns.convert(teacher, "layer_norm", inputs={"pixel_values": X[:2]})
    ns.recover(student, teacher, data, steps=10)
    expected, original = pair()
    ns.recover(expected, original, batches(), steps=10, loss="kl")  # they are called logits there
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.net.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class InTuples(nn.Module):
    """Blocks that return a tuple, as those of transformers did."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = ConvBN(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x + self.body(x),)

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([self.Block(), self.Block()]), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            (x,) = block(x)
        return self.head(x.mean((2, 3)))


def test_blocks_that_return_tuples_are_matched() -> None:
    teacher = randomise(InTuples()).eval()
    student = ns.convert(teacher, "layer_norm", inputs=X[:2])
    assert matched(student, teacher, capture(teacher, X[:2])) == ["blocks.0", "blocks.1"]
    ns.recover(student, teacher, UNLABELLED, steps=3)


def test_other_tasks_have_a_loss_of_their_own() -> None:
    teacher = randomise(nn.Sequential(ConvBN(3, 4), nn.Flatten(0))).eval()
    student = ns.convert(teacher, "layer_norm", inputs=X[:2])
    seen = []

    def loss(output: Tensor, target: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        return (output - target).square().mean()

    ns.recover(student, teacher, UNLABELLED, steps=2, loss=loss)
    # The held-back batch as given, calibrated, before the first step and after each; two steps.
    first, others = UNLABELLED[0], UNLABELLED[1:3]
    assert [id(each) for each in seen] == [
        id(each) for each in (first,) * 3 + (others[0], first, others[1], first)
    ]
    with pytest.raises(NormswapError, match="loss is 'mae'; it is kl, bce, mse, cosine, or"):
        ns.recover(student, teacher, UNLABELLED, steps=2, loss="mae")


@pytest.mark.parametrize("fails", [False, True])
def test_both_models_are_the_users_afterwards(fails: bool) -> None:
    student, teacher = pair(exclude="blocks.1.*")
    student.train()
    student.stem.bn.eval()
    student.head.bias.requires_grad_(False)
    student.to(memory_format=torch.channels_last)
    student.head.weight.grad = torch.ones_like(student.head.weight)
    student.register_forward_hook(lambda *args: None)
    teacher.drop.train()
    before, others = shape(student), shape(teacher)
    weights = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def data() -> Any:
        yield from UNLABELLED * 2
        raise KeyError("the user's own")

    if fails:
        with pytest.raises(NormswapError, match=r"at batch 11: KeyError: .the user's own"):
            ns.recover(student, teacher, data(), steps=30)
    else:
        ns.recover(student, teacher, UNLABELLED, steps=3)
    assert shape(student) == before and shape(teacher) == others
    assert same_bits(teacher.state_dict(), weights)
    assert torch.equal(student.head.bias, start["head.bias"])
    # The statistics of the BatchNorm that was not replaced.
    assert torch.equal(student.blocks[1].bn.running_mean, start["blocks.1.bn.running_mean"])
    assert same_bits(student.state_dict(), start) is fails


@pytest.mark.parametrize(
    "method", ["layer_norm", "group_norm", "rms_norm", "dynamic_tanh", "global_response_norm"]
)
def test_a_student_as_the_swap_left_it_starts_calibrated(method: str) -> None:
    found = []
    for calibrated in (False, True):
        student, teacher = pair(method)
        if calibrated:
            ns.calibrate(student, teacher, UNLABELLED[1:])  # the first is held back
        # A step of no length shows the start.
        ns.recover(student, teacher, UNLABELLED, steps=1, lr=1e-12)
        found.append(student.state_dict())
    student, teacher = pair(method)
    ns.calibrate(student, teacher, UNLABELLED[1:])
    for name, value in student.state_dict().items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-4)
    for name, value in found[1].items():  # calibrated once more it moves by less than the tolerance
        torch.testing.assert_close(found[0][name], value, rtol=1e-2, atol=1e-2)


def test_a_student_that_is_closer_as_it_is_starts_as_it_is() -> None:
    student, teacher = pair()
    ns.recover(student, teacher, UNLABELLED, steps=49, loss="kl")
    before = copy.deepcopy(student.state_dict())
    assert disagreement(ns.calibrate(copy.deepcopy(student), teacher, UNLABELLED), teacher) > (
        disagreement(student, teacher)
    )
    ns.recover(student, teacher, UNLABELLED, steps=1, lr=1e-12, loss="kl")
    for name, value in before.items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_a_short_run_has_the_usual_rate_unless_another_is_given() -> None:
    found = []
    for options in ({}, {"lr": LR}):
        student, teacher = pair()
        found.append(ns.recover(student, teacher, UNLABELLED, steps=3, **options).state_dict())
    assert same_bits(*found)


def test_a_student_that_does_what_its_teacher_does_stays_as_it_is() -> None:
    student, teacher = pair("batch_renorm")
    before = copy.deepcopy(student.state_dict())
    with pytest.warns(UserWarning, match=r"no step brought the student nearer .*\(0 before"):
        ns.recover(student, teacher, UNLABELLED, steps=3)
    assert same_bits(student.state_dict(), before)


def test_a_rate_is_found_by_a_few_steps() -> None:
    from normswap.fit.probe import FACTOR, found_rate

    for best in (1 / FACTOR**2, 1.0, FACTOR):
        tried = []

        def outcome(rate: float, best: float = best, tried: list[float] = tried) -> float:
            tried.append(rate)
            return abs(math.log(rate / best))

        assert found_rate(1.0, 10.0, outcome) == best and len(tried) <= 4
    # No rate helps in so few steps: a lower one only moves less.
    noise = {1.0: 1.1, 1 / FACTOR: 1.01, 1 / FACTOR**2: 0.99, 1 / FACTOR**3: 1.0}
    assert found_rate(1.0, 1.0, noise.__getitem__) == 1.0
    far = {**noise, 1.0: 2.0}
    assert found_rate(1.0, 1.0, far.__getitem__) == 1 / FACTOR
    student, teacher = pair()
    done = recovery(student, teacher, UNLABELLED, Settings(steps=50))
    times = math.log(done.lr / LR, FACTOR)
    assert times == pytest.approx(round(times))


def test_a_student_in_which_nothing_was_replaced_is_refused() -> None:
    with pytest.raises(NormswapError, match="same normalization layers"):
        ns.recover(net(), net(), UNLABELLED, steps=1)


def test_data_that_can_be_read_once_are_enough() -> None:
    student, teacher = pair()
    ns.recover(student, teacher, iter(UNLABELLED * 2), steps=10)
    with pytest.raises(NormswapError, match="ended after 5 batches"):
        ns.recover(student, teacher, iter(UNLABELLED), steps=10)


def test_labels_change_nothing_but_the_display() -> None:
    found = []
    for data in (UNLABELLED, batches()):
        student, teacher = pair()
        found.append(ns.recover(student, teacher, data, steps=3).state_dict())
    assert same_bits(*found)


def test_the_same_seed_gives_the_same_bits() -> None:
    found = []
    for _ in range(2):
        student, teacher = pair()
        found.append(ns.recover(student, teacher, loader(), steps=6).state_dict())
    assert same_bits(*found)
