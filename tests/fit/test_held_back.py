"""What is held back is not trained on, and a student comes back no worse by it than it went in."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import SAMPLES, X, batches, loader, moved_and_mirrored, net
from networks import ConvBN, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit.held_back import Judge, held_back
from normswap.fit.outputs import parts_of, tensors_in
from normswap.fit.recover import recovery
from normswap.fit.stream import Stream
from normswap.fit.training import Settings
from normswap.graph.snapshot import evaluating


def taken(stream: Stream, count: int) -> list[Tensor]:
    return [next(stream)[0] for _ in range(count)]


def test_of_a_list_the_first_tenth_never_comes_in_any_pass() -> None:
    data = batches(2)
    split = held_back(data, 100)
    assert len(split.held) == len(data) // 10
    read = taken(split.stream, 40)
    for x, _ in split.held:
        assert not any(x is each for each in read)
    assert {id(x) for x in read} == {id(x) for x, _ in data[len(split.held) :]}
    assert split.first[0] is data[len(split.held)]


def test_of_images_that_normswap_reads_samples_are_held_back_as_they_are() -> None:
    data = moved_and_mirrored()
    held = torch.cat([x for x, _ in held_back(data, 100).held])
    assert torch.equal(held, X[: SAMPLES // 10])
    rest = held_back(data, 100).stream.data
    assert rest.data.order.tolist() == list(range(SAMPLES // 10, SAMPLES))
    assert rest.flip and rest.crop == data.crop


def test_of_a_loader_the_first_batches_of_a_pass_are_left_out() -> None:
    data = loader(generator=torch.Generator().manual_seed(3))
    first = [x for x, _ in loader(generator=torch.Generator().manual_seed(3))]
    split = held_back(data, 100)
    assert len(split.held) == 1 and len(taken(split.stream, 4)) == 4 and len(first) == 5
    assert split.stream.read == 5 and split.stream.passes == 1


def test_an_iterator_gives_what_is_held_back_last() -> None:
    data = [x for x, _ in batches()]
    split = held_back(iter(data), 5)
    assert split.held == data[:1] and split.first == data[1:]
    assert [id(next(split.stream)) for _ in data] == [id(each) for each in data[1:] + data[:1]]


def test_one_batch_serves_for_both() -> None:
    data = [X]
    split = held_back(data, 5)
    assert split.held == split.first == data and next(split.stream) is X


def test_no_batch_is_an_error() -> None:
    with pytest.raises(NormswapError, match="there is no batch"):
        held_back([], 5)


def test_a_run_that_only_gets_worse_is_known() -> None:
    found = iter((1.0, 2.0, 3.0, float("inf"), float("nan"), 1.0))
    judge = Judge(lambda: next(found))
    assert [judge.look(step) for step in range(4)] == [True, False, False, False]
    assert not judge.only_worse
    judge.look(4)
    assert judge.only_worse and judge.best == (0, 1.0)
    judge.look(5)
    assert not judge.only_worse


class Head(nn.Module):
    """Two convolutions with BatchNorm, and an output of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(ConvBN(3, 6), ConvBN(6, 6))
        self.pixel, self.linear = nn.Conv2d(6, 3, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        logits = 4 * self.linear(y.mean((2, 3)))
        return {
            "logits": lambda: logits,
            "probabilities": lambda: logits.softmax(1),
            "a sigmoid": lambda: logits.sigmoid(),
            "an embedding": lambda: F.normalize(logits),
            "an image": lambda: self.pixel(y),
            "a map": lambda: {"out": F.interpolate(self.pixel(y), scale_factor=2), "aux": logits},
            "a detector": lambda: (logits, logits[:, :2].sigmoid(), [self.pixel(y)]),
            "a sequence": lambda: self.linear(y.flatten(2).mT),
        }[self.kind]()


KINDS = (
    "logits",
    "probabilities",
    "a sigmoid",
    "an embedding",
    "an image",
    "a map",
    "a detector",
    "a sequence",
)
UNLABELLED = [x for x, _ in batches()]


def distance(student: nn.Module, teacher: nn.Module, held: Tensor) -> float:
    """By torch's own mean squared error, each part in units of the teacher's mean square."""
    with evaluating(student, teacher):
        ours, theirs = tensors_in(student(held)), tensors_in(teacher(held))
    return sum(float(F.mse_loss(ours[k], t) / t.square().mean()) for k, t in theirs.items())


def swapped(kind: str, method: str = "layer_norm") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = ns.reestimate(randomise(Head(kind)), UNLABELLED).eval()
    return ns.convert(teacher, method, inputs=X[:2]), teacher


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_comes_nearer(kind: str) -> None:
    student, teacher = swapped(kind)
    calibrated = ns.calibrate(copy.deepcopy(student), teacher, UNLABELLED[1:])
    done = recovery(student, teacher, UNLABELLED, Settings(steps=30))
    assert done.student is student and done.curve[0][0] == 0
    assert done.step > 0 and dict(done.curve)[done.step] < done.curve[0][1] <= done.given
    assert distance(student, teacher, X) < distance(calibrated, teacher, X)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    method=st.sampled_from(["layer_norm", "instance_norm", "rms_norm", "dynamic_tanh"]),
    lr=st.sampled_from([None, 0.02, 0.5, 30.0]),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
)
@pytest.mark.filterwarnings("ignore")
def test_it_is_never_worse_than_it_was(
    kind: str, method: str, lr: float | None, scale: float
) -> None:
    student, teacher = swapped(kind, method)
    given_ = copy.deepcopy(student)
    data = [scale * torch.randn(4, 3, 6, 6) for _ in range(4)]
    with suppress(NormswapError):  # the loss blew up; the student has its best weights
        ns.recover(student, teacher, data, steps=8, lr=lr)
    parts = parts_of(student, teacher, data[1:], None)
    with evaluating(student, teacher, given_):
        told = [tensors_in(each(data[0])) for each in (teacher, given_, student)]
    before, after = (
        sum(float(part.apart(each[part.name], told[0][part.name])) for part in parts)
        for each in told[1:]
    )
    assert after <= before * (1 + 1e-4) + 1e-6


def test_a_run_that_only_gets_worse_stops_early_and_says_what_to_try() -> None:
    student, teacher = swapped("logits")
    ns.calibrate(student, teacher, UNLABELLED)
    before = copy.deepcopy(student.state_dict())
    distances = itertools.count()

    def loss(output: Tensor, target: Tensor, batch: Any) -> Tensor:
        return output.sum() * 0 + next(distances)

    with pytest.warns(UserWarning, match="no step brought the student nearer") as told:
        done = recovery(student, teacher, UNLABELLED, Settings(steps=50), loss=loss, lr=0.02)
    assert "stopped after step 20 of 50" in str(told[-1].message)
    assert "try a lower rate than 0.02, more data, or a loss" in str(told[-1].message)
    assert [step for step, _ in done.curve] == [0, 5, 10, 15, 20]
    assert done.step == 0
    for name, value in before.items():
        torch.testing.assert_close(student.state_dict()[name], value)


def test_the_best_weights_are_kept_over_a_resume(tmp_path: Any) -> None:
    def run(steps: int, stop: int | None = None, **options: Any) -> dict[str, Tensor]:
        teacher = net().eval()
        student = ns.convert(teacher, "layer_norm", inputs=X[:2])
        data = [*UNLABELLED]

        class Interrupted(list):  # type: ignore[type-arg]
            read = 0

            def __iter__(self) -> Iterator[Tensor]:
                for x in super().__iter__():
                    Interrupted.read += 1
                    if stop is not None and Interrupted.read > stop:
                        raise KeyboardInterrupt
                    yield x

        ns.recover(student, teacher, Interrupted(data), steps=steps, lr=0.3, **options)
        return student.state_dict()

    expected = run(20)
    with pytest.raises(KeyboardInterrupt):
        run(20, 20, checkpoint=tmp_path, save_every=2)
    found = run(20, checkpoint=tmp_path, save_every=2, resume=True)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
