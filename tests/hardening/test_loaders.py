"""Data that go wrong: one line names the batch, the user's exception is its cause, and the model,
the random state and all else are as before.
"""

import dataclasses
import os
import random
import re
import signal
import sys
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from failing_data import FailingData
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.deploy import export
from normswap.fit import reading
from normswap.fit.evaluate import accuracy

pytestmark = pytest.mark.filterwarnings("ignore:.*which are too few")
CLASSES = 4
_GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, 6, 6, generator=_GENERATOR), torch.arange(24) % CLASSES
GOOD = list(zip(X.split(8), Y.split(8), strict=True))
FIRST, LABELS = GOOD[0]


class Net(nn.Module):
    """(N, 3, H, W) to (N, 4); it writes into its input, as many that normalize it do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Dropout(),
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x.sub_(0.1).mul_(1.5)))
        return self.head(self.drop(F.relu(x).mean((2, 3))))


def net() -> nn.Module:
    """Trained in part, with flags of all kinds."""
    torch.manual_seed(0)
    made = Net()
    nn.init.normal_(made.bn.weight)
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    made.conv.bias.requires_grad_(False)
    made.drop.eval()
    return made


def swapped(teacher: nn.Module) -> nn.Module:
    student = net()
    student.bn = nn.GroupNorm(2, 8)
    return student


Call = Callable[[Any], Any]


def calibrated(data: Any) -> tuple[list[nn.Module], Call]:
    teacher = net()
    student = swapped(teacher)
    return [student, teacher], lambda: ns.calibrate(student, teacher, data)


def recovered(data: Any) -> tuple[list[nn.Module], Call]:
    teacher = net()
    student = swapped(teacher)
    return [student, teacher], lambda: ns.recover(student, teacher, data, steps=4)


def on_one(verb: Callable[..., Any]) -> Callable[[Any], tuple[list[nn.Module], Call]]:
    def made(data: Any) -> tuple[list[nn.Module], Call]:
        model = net()
        return [model], lambda: verb(model, data)

    return made


def compared(data: Any) -> tuple[list[nn.Module], Call]:
    models = [net(), net()]
    return models, lambda: ns.compare(*models, data=data)


QUICK = {
    "calibrate": calibrated,
    "reestimate": on_one(ns.reestimate),
    "recover": recovered,
    "finetune": on_one(lambda m, data: ns.finetune(m, data, steps=4, statistics="update")),
    "accuracy": on_one(accuracy),
}
SLOW = {
    "convert": on_one(lambda m, data: ns.convert(m, "group_norm", data=data, inplace=True)),
    "compare": compared,
    "advise": on_one(lambda m, data: ns.advise(m, FIRST, data=data, batch_size=2)),
}
ALL = QUICK | SLOW


def int8(folder: Path) -> Callable[[Any], tuple[list[nn.Module], Call]]:
    file = folder / "net.onnx"
    return on_one(lambda m, data: ns.export(m, FIRST, file, precision="int8", data=data))


class Second:
    """Good batches, of which the second is what `make` makes."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        yield GOOD[0]
        random.random(), np.random.rand(), torch.rand(1)
        yield self.make()
        yield GOOD[2]


def loader(then: Callable[[], Any], **options: Any) -> DataLoader[Any]:
    options = {"num_workers": 1, "multiprocessing_context": "fork", **options}
    return DataLoader(FailingData(X, Y, then), 8, **options)


def state(models: list[nn.Module]) -> list[Any]:
    """All that a verb may not leave changed: weights, buffers, flags, hooks, random numbers."""
    _, keys, place, *rest = np.random.get_state()
    generators = [random.getstate(), keys.tolist(), place, rest, torch.get_rng_state().tolist()]
    return generators + [
        [
            {name: tensor.tolist() for name, tensor in model.state_dict().items()},
            [(p.requires_grad, p.grad is None, id(p)) for p in model.parameters()],
            [
                (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
                for name, m in model.named_modules()
            ],
        ]
        for model in models
    ]


def refused(
    verb: Callable[[Any], tuple[list[nn.Module], Call]],
    data: Any,
    kind: type[BaseException] = NormswapError,
) -> BaseException:
    """The error of a verb that changes nothing by it."""
    models, call = verb(data)
    before = state(models)
    with pytest.raises(kind) as error:
        call()
    assert state(models) == before
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return error.value


# --- exceptions of the user's own -----------------------------------------------------------------


def corrupt() -> None:
    raise KeyError("corrupt record")


def of_two_lines() -> None:
    raise ValueError("corrupt\nrecord")


def leave() -> None:
    sys.exit(3)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("verb", ALL)
@pytest.mark.parametrize("then", [corrupt, leave, of_two_lines])
def test_an_exception_of_the_data_is_the_cause_of_one_that_names_the_batch(
    verb: str, then: Callable[[], None]
) -> None:
    error = refused(ALL[verb], Second(then))
    kind, word = {
        corrupt: (KeyError, "corrupt record"),
        leave: (SystemExit, "3"),
        of_two_lines: (ValueError, "ValueError: corrupt"),
    }[then]
    assert "the data failed at batch 2: " in str(error) and word in str(error)
    assert isinstance(error.__cause__, kind)


@pytest.mark.parametrize("verb", ["calibrate", "finetune"])
def test_an_exception_in_a_worker_is_told_by_its_own_words(verb: str) -> None:
    error = refused(QUICK[verb], loader(of_two_lines))
    assert "the data failed at batch 2: ValueError: corrupt;" in str(error)


def test_a_worker_that_dies_is_told_of() -> None:
    error = refused(QUICK["finetune"], loader(die))
    assert "the data failed at batch" in str(error) and "DataLoader worker" in str(error)


def test_a_worker_that_dies_while_the_model_runs_is_no_fault_of_the_models() -> None:
    """torch raises wherever the program is by then."""

    class Interrupted(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(NormswapError, match=r"the data failed at batch 1 .* DataLoader worker"):
        accuracy(Interrupted(), GOOD)


@pytest.mark.parametrize("verb", ALL)
def test_ctrl_c_while_a_batch_is_read_leaves_all_as_before(verb: str) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    refused(ALL[verb], Second(pressed), KeyboardInterrupt)


def test_a_second_ctrl_c_in_a_run_leaves_the_model_as_before() -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    for verb in ("recover", "finetune"):
        refused(QUICK[verb], Late(twice), KeyboardInterrupt)


class Late:
    """Good batches, of which the third pass ends in `then`; a look at the first ones is a pass."""

    def __init__(self, then: Callable[[], Any]) -> None:
        self.then, self.passes = then, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from GOOD[:2]
        if self.passes == 2:
            self.then()
        yield GOOD[2]


@pytest.mark.parametrize("verb", ["calibrate", "reestimate", "recover", "finetune", "accuracy"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_names_the_batch_and_leaves_all_as_before(
    verb: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        if bool((x == GOOD[1][0]).all()):
            raise kind("CUDA out of memory. Tried to allocate 20 GiB")
        return of_class(self, x)

    of_class = Net.forward
    monkeypatch.setattr(Net, "forward", forward)
    error = refused(QUICK[verb], GOOD)
    assert str(error).startswith("batch 2: out of memory (") and "smaller batches" in str(error)
    assert isinstance(error.__cause__, kind)


# --- batches that are none ------------------------------------------------------------------------

FAKE = FakeTensorMode()


@dataclasses.dataclass
class Dataclass:
    x: Tensor
    y: Tensor


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no samples": (lambda: (FIRST[:0], LABELS[:0]), "it is empty, an input of 0x3x6x6"),
    "no samples, numpy": (lambda: (FIRST[:0].numpy(), LABELS[:0].numpy()), "it is empty"),
    "no pixels": (lambda: (FIRST[:, :, :0], LABELS), "it is empty, an input of 8x3x0x6"),
    "no images in a list": (lambda: ([], []), "it is empty"),
    "NaN": (lambda: (FIRST * torch.nan, LABELS), "finite"),
    "one NaN": (lambda: (FIRST.index_fill(0, torch.tensor(3), torch.nan), LABELS), "finite"),
    "infinity": (lambda: (FIRST / 0, LABELS), "finite"),
    "other keys": (lambda: {"pixels": FIRST, "labels": LABELS}, "unexpected keyword .*'pixels'"),
    "nothing in a dict": (dict, "a batch is"),
    "nothing in a tuple": (tuple, r"a batch is \(\)"),
    "None": (lambda: None, "a batch is None"),
    "a number": (lambda: 3.0, "a batch is 3.0 of type float"),
    "a text": (lambda: "batch", "a batch is 'batch' of type str"),
    "a dataclass": (lambda: Dataclass(FIRST, LABELS), "of type Dataclass"),
    "a tensor without axes": (
        lambda: (torch.tensor(1.0), LABELS),
        "does not run on an input of no axes",
    ),
    "texts in numpy": (
        lambda: (np.array(["a", "b"]), LABELS),
        "does not run on an input of type ndarray",
    ),
    "objects in numpy": (lambda: (np.array([None, {}]), LABELS), "does not run on"),
    "uint8": (lambda: (FIRST.byte(), LABELS), "does not run on an input of 8x3x6x6 uint8: "),
    "int64": (lambda: (FIRST.long(), LABELS), "does not run on an input of 8x3x6x6 int64: "),
    "complex": (lambda: (FIRST.to(torch.complex64), LABELS), "does not run on"),
    "fewer channels": (lambda: (FIRST[:, :2], LABELS), "does not run on an input of 8x2x6x6: "),
    "fewer axes": (lambda: (FIRST.flatten(1), LABELS), "does not run on an input of 8x108: "),
    "meta": (lambda: (FIRST.to("meta"), LABELS), "on the meta device"),
    "fake": (lambda: (FAKE.from_tensor(FIRST), LABELS), "fake tensors"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_batch_that_cannot_be_used_is_named_by_its_number(kind: str) -> None:
    make, says = BAD[kind]
    for verb in QUICK.values():
        error = refused(verb, Second(make))
        assert "batch 2" in str(error), error
        assert re.search(says, str(error)), error


@pytest.mark.parametrize("verb", SLOW)
@pytest.mark.parametrize("kind", ["no samples", "one NaN", "other keys", "uint8", "meta"])
def test_the_other_verbs_name_it_too(verb: str, kind: str) -> None:
    error = refused(SLOW[verb], Second(BAD[kind][0]))
    assert "batch 2" in str(error), error


def test_so_does_the_export_in_eight_bits(tmp_path: Path) -> None:
    error = refused(int8(tmp_path), Second(BAD["one NaN"][0]))
    assert "batch 2: it holds numbers that are not finite" in str(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["uint8", "int64", "fewer channels", "fewer axes", "meta", "None"])
def test_what_the_file_does_not_take_is_no_fault_of_the_quantization(form: str) -> None:
    shape, kind = ir.Shape(["N", 3, 6, 6]), ir.TensorType(ir.DataType.FLOAT)
    image = ir.Value(name="x", shape=shape, type=kind)
    feeds = export._feeds(net(), Second(BAD[form][0]), ir.Graph([image], [], nodes=[]))
    assert next(feeds)["x"].shape == (8, 3, 6, 6)
    with pytest.raises(NormswapError, match="batch 2: "):
        next(feeds)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (TensorDataset(X, Y), "pass a DataLoader of it"),
        (X, "a tensor is read item by item: if it is one batch, pass it in a list"),
        (X.numpy(), "a tensor is read item by item"),
        ((X, Y), "a tuple is read item by item"),
        ("demo:digits", "data is the text 'demo:digits'"),
    ],
    ids=["dataset", "tensor", "numpy", "pair", "text"],
)
def test_samples_that_were_given_for_batches_are_told_of(data: Any, says: str) -> None:
    for name, verb in ALL.items():
        assert says in str(refused(verb, data)), name


@pytest.mark.parametrize("verb", ["recover", "finetune", "compare", "advise"])
def test_so_are_those_whose_labels_come_first(verb: str) -> None:
    assert "a tuple is read item by item" in str(refused(ALL[verb], (Y, X)))


class TwoInputs(Net):
    """Takes the second image beside the first."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + super().forward(other)


def test_several_inputs_are_given_by_name() -> None:
    with pytest.raises(NormswapError, match="holds them in a dict, by name"):
        ns.convert(TwoInputs().eval(), "layer_norm", data=[(FIRST, FIRST)])
    ns.convert(TwoInputs().eval(), "layer_norm", data=[{"x": FIRST, "other": FIRST}])


def test_an_empty_last_batch_is_named_and_data_without_any_are_told_of() -> None:
    for verb in QUICK.values():
        assert "batch 4: it is empty" in str(refused(verb, [*GOOD, (FIRST[:0], LABELS[:0])]))
    for verb in ALL.values():
        for none in ([], iter([]), DataLoader(TensorDataset(X[:0], Y[:0]), 8)):
            assert "batch" in str(refused(verb, none))


def test_a_batch_of_one_value_has_no_batch_statistics() -> None:
    error = refused(QUICK["finetune"], Second(lambda: (FIRST[:1, :, :1, :1], LABELS[:1])))
    assert "batch 2" in str(error) and "more than 1 value per channel" in str(error)


LABELLED: dict[str, tuple[Tensor, str]] = {
    "too high": (LABELS + 1, "labels go from 1 to 4, but the model has 4 outputs"),
    "negative": (LABELS - 2, "labels go from -2 to 1"),
    "fractions": (LABELS + 0.5, "class"),
    "one-hot": (F.one_hot(LABELS, CLASSES), "class"),
    "too few": (LABELS[:5], r"labels \(5,\)"),
}


@pytest.mark.parametrize("kind", LABELLED)
@pytest.mark.parametrize("verb", ["finetune", "accuracy"])
def test_labels_that_name_no_class_are_told_of(kind: str, verb: str) -> None:
    labels, says = LABELLED[kind]
    error = refused(QUICK[verb], Second(lambda: (FIRST, labels)))
    assert str(error).startswith("batch 2: ")
    assert re.search(says, str(error)), error


def test_labels_of_other_classes_do_not_stop_what_needs_none() -> None:
    data = [(x, y + 90) for x, y in GOOD]
    for verb in ("calibrate", "recover"):
        QUICK[verb](data)[1]()  # type: ignore[call-arg]
    error = refused(SLOW["compare"], data)
    assert str(error).startswith("batch 1: labels go from 90")


def test_samples_without_a_label_and_predictions_that_are_none_are_not_right() -> None:
    model = net().eval()
    right = model(FIRST.clone()).argmax(1)
    half = torch.where(torch.arange(8) < 4, right, -100)
    assert accuracy(model, [(FIRST, half)]) == 1
    model.head.weight.data.fill_(torch.nan)
    model.head.bias.data.fill_(torch.nan)
    assert accuracy(model, [(FIRST, LABELS * 0)]) == 0  # the first of many NaN is no prediction


# --- batches of other forms -----------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


class Items:
    """A map-style dataset of batches that raises no IndexError at its end."""

    def __len__(self) -> int:
        return len(GOOD)

    def __getitem__(self, index: int) -> Any:
        return GOOD[index % len(GOOD)]


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


def read_only(tensor: Tensor) -> Any:
    array = tensor.numpy().copy()
    array.setflags(write=False)
    return array


FORMS: dict[str, Callable[[], Iterable[Any]]] = {
    "numpy": lambda: [(x.numpy(), y.numpy()) for x, y in GOOD],
    "numpy of other layouts": lambda: [
        (np.flip(np.flip(x.numpy(), 0).copy(), 0), read_only(y)) for x, y in GOOD
    ],
    "numpy of other types": lambda: [
        (x.numpy().astype(">f8"), y.numpy().astype(np.int16).astype(np.int64)) for x, y in GOOD
    ],
    "numpy in long double": lambda: [(x.numpy().astype(np.longdouble), y) for x, y in GOOD],
    "numpy of keywords": lambda: [(x.numpy(), y.numpy().tolist()) for x, y in GOOD],
    "float64": lambda: [(x.double(), y) for x, y in GOOD],
    "more in the tuple": lambda: [(x, y, "file", {"id": 3}) for x, y in GOOD],
    "lists": lambda: [[x, y] for x, y in GOOD],
    "named tuples": lambda: [Pair(x, y) for x, y in GOOD],
    "named tuples of numpy": lambda: [Pair(x.numpy(), y) for x, y in GOOD],
    "labels in a list": lambda: [(x, y.tolist()) for x, y in GOOD],
    "labels in bytes": lambda: [(x, y.byte()) for x, y in GOOD],
    "items": Items,  # type: ignore[dict-item]
    "a streamed dataset": lambda: DataLoader(Streamed(), 8),
    "workers that stay": lambda: loader(lambda: None, persistent_workers=True),
}


def result(verb: str, data: Any) -> Any:
    models, call = QUICK[verb](data)
    torch.manual_seed(0)
    given = call()  # type: ignore[call-arg]
    return given if isinstance(given, float) else models[0].state_dict()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {verb: result(verb, GOOD) for verb in QUICK}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form_are_the_same_batches(form: str, expected: dict[str, Any]) -> None:
    before = [x.clone() for x, _ in GOOD]
    for verb in ("calibrate", "finetune", "accuracy"):
        torch.testing.assert_close(result(verb, FORMS[form]()), expected[verb], rtol=0, atol=0)
    assert all(torch.equal(x, old) for (x, _), old in zip(GOOD, before, strict=True))


def test_keyword_batches_of_every_mapping_are_the_same_batches(expected: dict[str, Any]) -> None:
    for form in (dict, UserDict):
        for x in (lambda x: x, lambda x: x.numpy()):
            data = [form(x=x(each)) for each, _ in GOOD]
            torch.testing.assert_close(
                result("reestimate", data), expected["reestimate"], rtol=0, atol=0
            )


def test_a_model_that_writes_into_its_input_does_not_change_the_data() -> None:
    """They are read in every sweep, by both models."""

    class Pure(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())

    def made(of: type[Net]) -> nn.Module:
        model = net()
        model.__class__ = of
        return model

    for verb in (
        lambda of: ns.convert(made(of), "group_norm", data=GOOD, groups=2),
        lambda of: ns.reestimate(made(of), GOOD),
        lambda of: ns.finetune(made(of), GOOD, steps=4),
    ):
        torch.manual_seed(0)
        wanted = verb(Pure).state_dict()
        torch.manual_seed(0)
        found = verb(Net).state_dict()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert torch.equal(X, torch.cat([x for x, _ in GOOD]))


def test_an_iterator_is_read_once_and_told_of_when_it_has_ended(expected: dict[str, Any]) -> None:
    batches = iter(GOOD)
    torch.testing.assert_close(result("calibrate", batches), expected["calibrate"], rtol=0, atol=0)
    for verb in QUICK.values():
        assert "batch" in str(refused(verb, batches))
    for verb in ("recover", "finetune"):
        error = refused(QUICK[verb], (each for each in GOOD))
        assert "the data ended after 3 batches and cannot be read again" in str(error)


def test_an_iterator_that_never_ends_does_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "MOST_KEPT", 50)

    def endless() -> Iterator[Any]:
        while True:
            yield from GOOD

    for verb in ("calibrate", "reestimate"):
        assert "has not ended after 50 batches" in str(refused(QUICK[verb], endless()))
    refused(SLOW["compare"], endless())
    ns.reestimate(net(), endless(), batches=3)
    ns.finetune(net(), endless(), steps=2)


@pytest.mark.parametrize("data", [None, 3, lambda: iter(GOOD), "imagenet", torch.tensor(1.0)])
def test_what_holds_no_batches_is_told_of(data: Any) -> None:
    for verb in QUICK.values():
        refused(verb, data)


def test_a_dataset_that_cannot_be_sent_to_a_worker_is_told_of() -> None:
    data = loader(lambda: None, multiprocessing_context="spawn")
    for verb in ("reestimate", "finetune"):
        assert "the data failed at batch 1: " in str(refused(QUICK[verb], data))


# --- no numbers at all ----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ALL)
def test_a_model_without_numbers_is_told_of(verb: str) -> None:
    models, call = ALL[verb](GOOD)
    for model in models:
        model.to("meta")
    with pytest.raises(NormswapError, match="meta device") as error:
        call()  # type: ignore[call-arg]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verb", QUICK)
def test_the_default_device_meta_changes_nothing(verb: str, expected: dict[str, Any]) -> None:
    models, call = QUICK[verb](DataLoader(TensorDataset(X, Y), 8))
    torch.manual_seed(0)
    with torch.device("meta"):
        given = call()  # type: ignore[call-arg]
    found = given if isinstance(given, float) else models[0].state_dict()
    torch.testing.assert_close(found, expected[verb], rtol=0, atol=0)


@pytest.mark.parametrize("verb", ALL)
def test_fake_tensors_switched_on_are_told_of(verb: str) -> None:
    models, call = ALL[verb](GOOD)
    before = state(models)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.raises(NormswapError, match="under FakeTensorMode"), fake:
        call()  # type: ignore[call-arg]
    assert state(models) == before
