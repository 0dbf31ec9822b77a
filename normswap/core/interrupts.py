"""What is changed for a while is put back, whatever ends the block: an exception, or Ctrl-C.

`with` alone does not see to that. Ctrl-C raises between any two steps of Python, and so also after
the block and before the first line of `__exit__`, or half-way through it. Two things help:

- what undoes a change (`at_last`) may be done twice, and is, where an exception stopped it;
- while a public function runs (`whole`), Ctrl-C waits as long as some context manager, whosever it
  is, is being entered or left: torch.export and torch.fx change much by context managers, too.

What goes on in steps is interrupted between two of them (`deferred`).
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from threading import current_thread, get_ident, main_thread
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MISSING = object()


@contextmanager
def at_last(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` when the block ends, in whatever way; once more where an exception stopped it.

    Args:
        undo: what does no harm where it is called again, or nothing has been changed yet. So the
            change belongs into the block.
    """
    try:
        try:
            yield
        finally:
            undo()
    except BaseException:
        undo()
        raise
    deliver()


@contextmanager
def entered(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """`with contexts:`, each of which is left for certain.

    A context manager that is a class is not left where an exception comes between the block and the
    first line of its `__exit__`; a generator is, as Python closes it.
    """
    stack = ExitStack()
    with at_last(stack.close):
        for each in contexts:
            stack.enter_context(each)
        yield


@contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Inside, `owner` has these attributes; after it its own, or none where it had none."""
    before = {name: getattr(owner, name, _MISSING) for name in values}
    with at_last(partial(_set, owner, before)):
        _set(owner, values)
        yield


def _set(owner: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is not _MISSING:
            setattr(owner, name, value)
        elif hasattr(owner, name):
            delattr(owner, name)


def whole(
    function: Callable[_P, _R], within: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[_P, _R]:
    """Decorate a function that changes things for a while, and puts them back.

    Until it returns or raises, Ctrl-C waits while a context manager is entered or left, and at the
    end torch's settings of this thread that a block may have left behind are what they were.

    Args:
        within: makes the context manager in which the function runs.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        around = _Around()
        try:
            try:
                around.begin()
                with within():
                    return function(*args, **kwargs)
            finally:
                around.end()
        except BaseException:
            around.end()
            raise

    return run


class _Waiting:
    """The handler of Ctrl-C while a function that is `whole` runs.

    Attributes:
        before: the handler that it takes the place of, and calls.
        held: whether one waits.
    """

    def __init__(self, before: Callable[[int, FrameType | None], Any]) -> None:
        self.before, self.held = before, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _is_entering_or_leaving(frame):
            self.held = True
        else:
            self.held = False
            self.before(number, frame)

    def deliver(self) -> None:
        if self.held:
            self.held = False
            self.before(signal.SIGINT, None)


class _Around:
    """What is as before at the end of a function that is `whole`."""

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._autocast = {kind: torch.is_autocast_enabled(kind) for kind in _kinds_of_device()}
        self._waiting: _Waiting | None = None

    def begin(self) -> None:
        if get_ident() == main_thread().ident:  # the only one that signals interrupt
            before = signal.getsignal(signal.SIGINT)
            # What is no function ends the program, or ignores Ctrl-C.
            if callable(before) and not isinstance(before, _Waiting):
                self._waiting = _Waiting(before)
                signal.signal(signal.SIGINT, self._waiting)

    def end(self) -> None:
        if torch.is_grad_enabled() is not self._gradients:
            torch.set_grad_enabled(self._gradients)
        for kind, enabled in self._autocast.items():
            if torch.is_autocast_enabled(kind) is not enabled:
                torch.set_autocast_enabled(kind, enabled)
        waiting = self._waiting
        if waiting is not None:
            handler: Any = signal.getsignal(signal.SIGINT)
            if handler is waiting:  # and none that was put in its place meanwhile
                signal.signal(signal.SIGINT, waiting.before)
            waiting.deliver()


def _kinds_of_device() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def deliver() -> None:
    """Raise KeyboardInterrupt, or whatever the program does then, where a Ctrl-C waits."""
    if get_ident() == main_thread().ident:
        handler = signal.getsignal(signal.SIGINT)
        if isinstance(handler, _Waiting):
            handler.deliver()


def _is_entering_or_leaving(frame: FrameType | None) -> bool:
    """Whether the code at `frame` is below a context manager's own, inside of a `whole` function.

    The body of `with` is not below it, that of a generator with @contextmanager is.
    """
    while frame is not None and frame.f_code is not _RUN:
        if frame.f_code.co_name in ("__enter__", "__exit__") or frame.f_code in _OURS:
            return True
        frame = frame.f_back
    return False


_RUN = whole(lambda: None).__code__
_OURS = {_Around.begin.__code__, _Around.end.__code__}


class StopRequested(KeyboardInterrupt):
    """Ctrl-C, after the step it came in: the model is whole. The message says how to go on."""


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second one interrupts at once.

    Signals reach the main thread alone; elsewhere the function always says no.
    """
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if current_thread() is not main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
