"""Whatever stops a verb, at whatever line or moment, a model is the old one or the new one.

And what belongs to the process or to the thread is as it was.
"""

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
from normswap.errors import NormswapError
from normswap.fit.evaluate import accuracy
from normswap.graph.capture import capture
from normswap.graph.inspection import inspect
from normswap.passes import Bake, Center, Fold, Freeze, Parametrize, Replace
from normswap.passes.plan import plan
from normswap.passes.verbs import fold, parametrize

PACKAGE = str(Path(normswap.__file__).parent)
X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2])


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

    files = "graph/exporting.py", "graph/capture.py", "ambient.py", "interrupts.py"
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
