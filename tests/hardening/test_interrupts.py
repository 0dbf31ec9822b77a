"""Whatever stops a verb, at whatever line or moment, a model is the old one or the new one.

And what belongs to the process or the thread is as it was: torch's settings, the state of the random
number generators, filters of warnings, streams, the handler of Ctrl-C, and what is replaced in torch
while it traces.
"""

import builtins
import gc
import math
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import normswap as ns
from normswap.fit.evaluate import accuracy
from normswap.graph.exporting import _ModuleStackTracer, _Patcher
from normswap.graph.forward import CHANGED
from normswap.graph.snapshot import held

PACKAGE = str(Path(ns.__file__).parent)
X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2])


# --- what a model is ------------------------------------------------------------------------------


def state_of(model: nn.Module) -> Any:
    """All that a model is: classes, attributes, hooks, flags, and the bits and versions of tensors."""
    seen: dict[int, Any] = {}
    for value in held(model):
        if isinstance(value, Tensor):
            bits = value.detach().clone() if not nn.parameter.is_lazy(value) else None
            seen[id(value)] = value.requires_grad, value.data_ptr(), bits, value.grad
        elif isinstance(value, nn.Module):
            forward = type(value).forward
            seen[id(value)] = type(value), forward, _shallow(vars(value))
        elif isinstance(value, dict):
            seen[id(value)] = _shallow(value)
        elif isinstance(value, (list, tuple, set, frozenset)):
            seen[id(value)] = type(value), [_name(each) for each in value]
    # By the order in which they are reached, as a registry may be another dictionary by now.
    return [each for each in seen.values()], list(model.named_modules(remove_duplicate=False))


def _shallow(attributes: dict[Any, Any]) -> list[Any]:
    return [(key, _name(value)) for key, value in attributes.items()]


def _name(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _name(each)) for key, each in value.items()]
    if isinstance(value, (int, float, str, bool, type(None))):
        return type(value), value
    return id(value)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
