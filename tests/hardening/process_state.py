"""What belongs to the process or to the thread, and what a model is: both to be compared."""

import builtins
import gc
import logging
import math
import os
import random
import signal
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _Patcher
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from normswap.core import ambient
from normswap.graph.forward import CHANGED

_BATCH_NORM = torch.ops.aten.native_batch_norm.default


def ambient_state() -> dict[str, Any]:
    """Every setting of the process and of this thread that some verb changes for a while."""
    hooks = torch.nn.modules.module
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast nesting": _nesting(),
        "modes": [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()],
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random of torch": torch.get_rng_state().tolist(),
        "random of Python": random.getstate(),
        "random of numpy": repr(np.random.get_state()),
        "streams": (sys.stdout, sys.stderr),
        "filters": list(warnings.filters),
        "warnings": (warnings.showwarning, warnings.warn),
        "collecting": (gc.isenabled(), gc.get_threshold()),
        "Ctrl-C": signal.getsignal(signal.SIGINT),
        "environment": dict(os.environ),
        "logging": (
            logging.root.manager.disable,
            [logging.getLogger(name).level for name in ("", "torch.onnx", "torch.export")],
        ),
        "module": (nn.Module.__call__, nn.Module.__getattr__),
        "builtins": (builtins.max, builtins.min, math.pow),
        "tracers": (_ModuleStackTracer.__init__, _ModuleStackTracer.trace, _Patcher.patch_method),
        "traces": getattr(fx.config, "do_not_emit_stack_traces", None),
        "checkpoint": (
            checkpoint.CheckpointFunction,
            checkpoint._checkpoint_without_reentrant_generator,
        ),
        "kernels": dict(_BATCH_NORM.py_kernels),
        "distributions": torch.distributions.Distribution._validate_args,
        "global hooks": (
            set(hooks._global_buffer_registration_hooks),
            set(hooks._global_module_registration_hooks),
        ),
        "rewriting": CHANGED.get(),
        "lock": ambient._is_mine(ambient._turn),
    }


def _nesting() -> int:
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {before[name]!s:.400} became {after[name]!s:.400}"
        for name in before
        if before[name] != after[name]
    ]


# --- a model --------------------------------------------------------------------------------------


def state_of(model: nn.Module, *, itself: bool) -> dict[str, Any]:
    """By path: classes, attributes, flags, hooks, and what the tensors hold.

    Args:
        itself: also which objects these are, which a copy of the model has others of.
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = type(module) if itself else type(module).__qualname__
        for name, value in vars(module).items():
            found[f"{path}:{name}"] = _told(value, itself)
    return found


def _told(value: Any, itself: bool) -> Any:
    if isinstance(value, Tensor):
        identity = (id(value), value.data_ptr(), id(value.grad)) if itself else ()
        bits = value.detach().contiguous().view(-1).view(torch.uint8).tolist()
        return value.dtype, value.shape, value.requires_grad, bits, identity
    if isinstance(value, dict):
        keys = list(value) if itself else [key if isinstance(key, str) else "" for key in value]
        return [(key, _told(value[own], itself)) for key, own in zip(keys, value, strict=True)]
    if isinstance(value, (list, tuple)):
        return type(value), [_told(each, itself) for each in value]
    if isinstance(value, (int, float, str, type(None))):
        return type(value), value
    return id(value) if itself else type(value).__qualname__
