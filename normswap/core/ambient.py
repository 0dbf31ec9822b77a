"""What belongs to the process or the thread, and not to a model: it must not change what a verb
makes, and no verb may change it.
"""

import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

# torch has no public way to ask whether its fake tensors are switched on.
from normswap.core.compat import detect_fake_mode, is_transforming
from normswap.core.errors import NormswapError
from normswap.core.interrupts import at_last, deliver, entered, whole

_P = ParamSpec("_P")
_R = TypeVar("_R")


def usual_settings() -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator, `@usual_settings()`: inside, torch is as it is when a program starts.

    - Under `torch.inference_mode()` parameters would be made that never train; under `no_grad`
      nothing could be trained.
    - Under autocast a captured graph would have casts in it, and weights would be computed in half
      precision.
    - On the device "meta" new tensors would have no contents.
    - What the model, the data or an import draws at random would shift what the caller draws next,
      so the generators end where they began.

    The function is `whole` as well (`normswap.core.interrupts`).

    Raises:
        NormswapError: a transform of torch.func is running, which has replaced the tensors, or
            FakeTensorMode, under which no tensor has numbers.
    """
    return partial(whole, within=_usual)


@contextmanager
def _usual() -> Iterator[None]:
    # torch has no public name for it.
    if is_transforming():
        raise NormswapError(
            "a model cannot be rewritten inside torch.func.grad, vmap or another of its "
            "transforms; rewrite it first, and transform the result"
        )
    if detect_fake_mode() is not None:
        raise NormswapError(
            "under FakeTensorMode tensors have no numbers; call this outside of it, on the model "
            "with its weights"
        )
    settings: list[Any] = [generators_kept(), torch.inference_mode(False), torch.enable_grad()]
    for device in ("cpu", torch.accelerator.current_accelerator()):
        kind = device if isinstance(device, str) or device is None else device.type
        if kind is not None and torch.is_autocast_enabled(kind):
            settings.append(torch.autocast(kind, enabled=False))
    if torch.get_default_device().type == "meta":
        settings.append(torch.device("cpu"))
    with entered(*settings):
        yield


# --- threads --------------------------------------------------------------------------------------

_turn = RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, no other thread is inside.

    For what changes the whole process and can only be done by one at a time: torch.export and
    torch.fx, which replace methods of nn.Module and builtins while they trace, and what seeds the
    random number generators or puts them back.
    """
    if _is_mine(_turn):
        yield
        return
    turn = _turn  # after a fork, the child has another

    def release() -> None:
        if _is_mine(turn):
            turn.release()

    with at_last(release):
        while not turn.acquire(timeout=0.2):
            deliver()
        yield


def _is_mine(lock: Any) -> bool:
    # The one question that no public method of an RLock answers; threading.Condition asks it, too.
    return bool(lock._is_owned())


def _before_fork() -> None:
    """A child has this thread alone: what another one has changed, nobody would put back."""
    # Should the other thread wait for this one, the child is let go without it.
    _turn.acquire(timeout=60)


def _after_fork() -> None:
    if _is_mine(_turn):
        _turn.release()


def _in_child() -> None:
    global _turn
    _turn = RLock()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn inside, every global generator ends in the state in which it began.

    Those are Python's, numpy's, and torch's of the CPU and of the devices that are in use.
    """
    back: list[Callable[[], object]] = []

    def restore() -> None:
        with alone():
            for each in back:
                each()

    with at_last(restore):
        with alone():  # another thread may have seeded them for a moment
            back += _states()
        yield


def _states() -> list[Callable[[], object]]:
    """What puts back each generator that has drawn."""
    states: list[Callable[[], object]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():  # before that it has drawn nothing
            states.append(partial(device.set_rng_state_all, device.get_rng_state_all()))
    if torch.mps.is_available():
        states.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return states


# --- warnings -------------------------------------------------------------------------------------


class _HereAlone:
    """In a filter of warnings, in place of the pattern of a message: matches all of one thread."""

    def match(self, message: str) -> bool:
        return self in _ignoring.get()


_ignoring: ContextVar[frozenset[_HereAlone]] = ContextVar("ignoring", default=frozenset())


@contextmanager
def warnings_ignored(category: type[Warning] = Warning) -> Iterator[None]:
    """Inside, this thread ignores warnings.

    `warnings.catch_warnings` is for the whole process: other threads would see none either, and
    where two are inside of it, the one that leaves last puts back what the other had set.
    """
    here = _HereAlone()
    # A filter as `warnings.filterwarnings` makes it, which takes no other pattern than text.
    entry: Any = ("ignore", here, category, None, 0)
    filters: Any = warnings.filters

    def remove() -> None:
        _ignoring.set(_ignoring.get() - {here})
        now: Any = warnings.filters  # another thread may have put in a list of its own
        for each in (filters, now):
            if entry in each:
                each.remove(entry)

    with at_last(remove):
        filters.insert(0, entry)
        _ignoring.set(_ignoring.get() | {here})
        yield


@contextmanager
def loggers_silent(*names: str) -> Iterator[None]:
    """Inside, these loggers, and those below them, record nothing."""
    levels = {name: logging.getLogger(name).level for name in names}

    def restore() -> None:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

    with at_last(restore):
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """Inside, a module that is imported may configure the root logger; afterwards it is as before.

    That logger is the application's, and so is what it shows.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def restore() -> None:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        root.setLevel(level)

    with at_last(restore):
        yield
