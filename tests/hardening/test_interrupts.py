"""Whatever stops a verb, at whatever line or moment, a model is the old one or the new one.

And what belongs to the process or to the thread is as it was.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch
from process_state import ambient_state, differences, state_of
from torch import nn

import normswap
from normswap.core.errors import NormswapError
from normswap.core.interrupts import at_last, whole
from normswap.fit.evaluate import accuracy
from normswap.graph.capture import capture
from normswap.passes import Bake, Center, Fold, Freeze, Parametrize, Replace
from normswap.passes.inspection import inspect
from normswap.passes.plan import plan
from normswap.passes.verbs import fold, parametrize

PACKAGE = str(Path(normswap.__file__).parent)
X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell starts what runs in the background with Ctrl-C ignored, and so its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, as this file raises it."""


class Lines:
    """The lines of normswap that run inside, of which that of number `stop` raises `error`."""

    def __init__(self, stop: int = -1, error: type[BaseException] = Stopped) -> None:
        self.ran: list[tuple[str, int]] = []
        self._stop, self._error = stop, error

    def __enter__(self) -> "Lines":
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.ran.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.ran) - 1 == self._stop:
                sys.settrace(self._before)
                raise self._error("at this line")
        return self._line


def moments(run: Callable[[], Any], number: int, *where: str) -> Iterator[int]:
    """When `run` comes to `number` different lines, drawn from those of files that end so."""
    with Lines() as lines:
        run()
    by_line: dict[tuple[str, int], list[int]] = {}
    for index, line in enumerate(lines.ran):
        if not where or line[0].endswith(where):
            by_line.setdefault(line, []).append(index)
    random = Random(0)
    for each in random.sample(list(by_line.values()), min(number, len(by_line))):
        yield random.choice(each)


def noted(*_: Any) -> None:
    """A hook."""


def net() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*first, nn.Linear(64, 4), nn.LayerNorm(4), nn.Linear(4, 3)).train()
    nn.init.normal_(model[1].weight)
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    model[2].eval()
    model[4].bias.requires_grad_(False)
    model[0].register_forward_hook(noted)
    model[0].register_forward_hook(lambda *_: None)
    model.notes = ["of the user"]
    return model


def check_old_or_new(
    make: Callable[[], nn.Module],
    verb: Callable[[nn.Module], Any],
    stops: Iterator[int],
    new: dict[str, Any],
    error: type[BaseException] = Stopped,
) -> None:
    for stop in stops:
        model = make()
        old, settings = state_of(model, itself=True), ambient_state()
        lines = Lines(stop, error)
        with suppress(error, NormswapError), lines:
            verb(model)
        where = lines.ran[-1]
        assert differences(settings, ambient_state()) == [], where
        is_old = state_of(model, itself=True) == old
        assert is_old or state_of(model, itself=False) == new, where


LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "accuracy": lambda model: accuracy(model, [(X, LABELS)]),
    "inspect": lambda model: inspect(model, X),
    "fold": lambda model: fold(model, X),
}


@pytest.mark.parametrize(("verb", "number"), [("accuracy", 30), ("inspect", 5), ("fold", 5)])
def test_what_only_looks_leaves_the_model_as_it_was_at_whatever_line_it_is_stopped(
    verb: str, number: int
) -> None:
    look = LOOKS[verb]
    look(net())  # what is imported and remembered at first
    check_old_or_new(net, look, moments(lambda: look(net()), number), {})


def test_a_capture_leaves_torch_as_it_was_at_whatever_line_it_is_stopped() -> None:
    def look(model: nn.Module) -> Any:
        return capture(model, X)

    files = "graph/exporting.py", "graph/capture.py", "core/ambient.py", "core/interrupts.py"
    check_old_or_new(net, look, moments(lambda: look(net()), 20, *files), {})


def weight_normed() -> nn.Module:
    return parametrize(net(), "weight_norm")


PLANS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "fold": (net, Fold()),
    "convert": (net, Replace("group_norm", groups=2)),
    "freeze": (net, Freeze("eval")),
    "tune": (net, Freeze("tune")),
    "center": (net, Center()),
    "parametrize": (net, Parametrize("weight_norm")),
    "bake": (weight_normed, Bake()),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("error", [Stopped, RuntimeError])
def test_a_plan_is_carried_out_whole_or_not_at_all_at_whatever_line_it_is_stopped(
    kind: str, error: type[BaseException]
) -> None:
    make, each = PLANS[kind]
    decided = plan(make(), each, inputs=X)

    def apply(model: nn.Module) -> nn.Module:
        return decided.apply(model, inplace=True)

    new = state_of(apply(make()), itself=False)
    stops = moments(lambda: apply(make()), 5 if error is Stopped else 2)
    check_old_or_new(make, apply, stops, new, error)


# --- signals --------------------------------------------------------------------------------------


def test_ctrl_c_at_any_moment_leaves_the_model_and_the_settings_as_they_were() -> None:
    model, data, random = net(), [(X, LABELS)] * 2, Random(0)
    accuracy(model, data)
    old, settings = state_of(model, itself=True), ambient_state()
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    stopped = 0
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.01))
                accuracy(model, data)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                stopped += 1
            assert differences(settings, ambient_state()) == []
            assert state_of(model, itself=True) == old
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert stopped


class Leaving:
    """A context manager in the middle of whose __exit__ somebody presses Ctrl-C."""

    def __init__(self, steps: list[str]) -> None:
        self._steps = steps

    def __enter__(self) -> None:
        self._steps.append("entered")

    def __exit__(self, *_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        self._steps.append("left")


def test_ctrl_c_waits_while_a_context_manager_is_left() -> None:
    steps: list[str] = []

    @whole
    def work(undo: Callable[[], None]) -> None:
        with at_last(undo), Leaving(steps):
            steps.append("body")
        steps.append("never")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work(lambda: steps.append("undone"))
    assert steps == ["entered", "body", "left", "undone"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_in_a_body_does_not_wait_and_the_programs_own_handler_is_called() -> None:
    pressed: list[int] = []
    steps: list[str] = []

    @whole
    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        steps.append(f"after {len(pressed)}")

    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        work()
        with Leaving(steps):  # outside of a function that is whole nothing waits
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == ["after 1", "entered", "left"] and len(pressed) == 2


def test_what_undoes_is_done_again_where_an_exception_stopped_it() -> None:
    steps: list[str] = []

    def undo() -> None:
        steps.append("begun")
        if len(steps) == 1:
            raise Stopped
        steps.append("done")

    with pytest.raises(Stopped), at_last(undo):
        pass
    assert steps == ["begun", "begun", "done"]
