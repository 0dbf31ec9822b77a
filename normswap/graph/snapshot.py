"""A model's structure at one moment, to be put back.

Looking at a model must not change it, and a plan is carried out whole or not at all. Both rest on
the same thing: a shallow copy of what every module holds. Tensors are referenced, not copied, so a
snapshot costs a few dictionaries; the contents of buffers are copied only on request.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from normswap.graph.supported import python_modules

# The dictionaries inside a module that are changed in place by registering something on it.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """The class and attributes of every module of `model`; `restore` puts them back."""

    def __init__(self, model: nn.Module, *, buffer_contents: bool = False) -> None:
        self._modules = [
            (module, type(module), _attributes(module)) for module in python_modules(model)
        ]
        # The dictionaries themselves stay: a hook's handle refers to the one it is in.
        self._hooks = [
            (value, dict(value))
            for module, _, attributes in self._modules
            for name, value in attributes.items()
            if isinstance(value, dict) and name not in _REGISTRIES
        ]
        # What a forward appends to (features, losses) as well.
        self._lists = [
            (value, list(value))
            for _, _, attributes in self._modules
            for value in attributes.values()
            if isinstance(value, list)
        ]
        self._buffers = (
            [
                (buffer, buffer.detach().clone())
                for buffer in model.buffers()
                if not (nn.parameter.is_lazy(buffer) or buffer.is_meta)  # those have no contents
            ]
            if buffer_contents
            else []
        )

    def restore(self) -> None:
        for module, cls, attributes in self._modules:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for name in _REGISTRIES:
                vars(module)[name] = dict(attributes[name])
        for hooks, content in self._hooks:
            hooks.clear()
            hooks.update(content)
        for values, items in self._lists:
            values[:] = items
        with torch.no_grad():
            for buffer, before in self._buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _attributes(module: nn.Module) -> dict[str, Any]:
    attributes = dict(vars(module))
    for name in _REGISTRIES:
        attributes[name] = dict(attributes[name])
    return attributes


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, `model` and the random number generators end as they began.

    Covers each module's class, attributes, training flag and hooks, the contents of the buffers,
    and the generators of torch (all devices), numpy and the standard library.
    """
    before = Snapshot(model, buffer_contents=True)
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        before.restore()
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside, `models` are in eval mode and record no gradients; after it they are `untouched`."""
    with ExitStack() as restored, torch.no_grad():
        for model in models:
            restored.enter_context(untouched(model))
            for module in model.modules():
                # Not eval(): a user's own may do more, and the module of a .pt2 refuses it.
                module.training = False
        yield


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Whatever mode the modules are put in inside, they end in the one they began in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the body raises, Ctrl-C included, `model` is put back as it was before."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise
