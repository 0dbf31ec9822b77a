"""Every name of torch that torch does not document, in one place.

Each says what it stands for and what to do when it goes. Nothing else in normswap imports or calls
a private name of torch, which `tests/test_layers.py` holds; the dictionaries of a module
(`_parameters`, `_buffers`, `_modules`, its hooks) are torch's own protocol for subclasses.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey as DispatchKey
from torch._guards import detect_fake_mode as detect_fake_mode
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._subclasses import FakeTensor as FakeTensor
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import _Patcher as Patcher
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer as ModuleStackTracer
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.conv import _ConvNd as AnyConv
from torch.nn.modules.conv import _ConvTransposeNd as AnyConvTranspose
from torch.nn.modules.instancenorm import _InstanceNorm as AnyInstanceNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

__all__ = [
    "AnyBatchNorm",
    "AnyConv",
    "AnyConvTranspose",
    "AnyInstanceNorm",
    "DispatchKey",
    "FakeTensor",
    "HigherOrderOperator",
    "ModuleStackTracer",
    "OpOverload",
    "OpOverloadPacket",
    "Patcher",
    "TorchDispatchMode",
    "detect_fake_mode",
    "pytree",
]

# Nested tuples, lists and dicts of tensors. torch.utils.pytree, which is documented as of 2.13, has
# the same functions under other names; take that when 2.13 is the oldest version supported.
# OpOverload, OpOverloadPacket, HigherOrderOperator: what a node of an exported graph calls. torch
# documents them by the graphs alone; type(torch.ops.aten.add.Tensor) is the way round an import.
# FakeTensor, detect_fake_mode: tensors without numbers, as torch.export traces with. Without them,
# look for a TorchDispatchMode by its name.
# TorchDispatchMode: sees every operator that runs; a TorchFunctionMode sees what Python calls.
# DispatchKey: the keys by which an operator finds its kernel; see `graph.exporting`.

# AnyBatchNorm and the others: the common base of the modules for one, two and three axes, where it
# is since torch 0.4; the union of the public classes is what is left if they go.
# Patcher: torch.fx's tracer puts its own functions in the place of a module's while it traces.
# Without it two threads must not trace at the same time.
# ModuleStackTracer: how torch.export names what it traces; patched for speed and silence alone.

# What a graph calls to switch gradients and autocast; without them `graph.exporting` sees no modes.
SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled
ENTER_AUTOCAST: Any = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Any = torch.amp.autocast_mode._exit_autocast
# What torch.fx writes for an assert statement.
ASSERT: Any = torch._assert


def is_transforming() -> bool:
    """Whether torch.func transforms what runs. Without it, such calls fail inside a kernel."""
    return bool(torch._C._are_functorch_transforms_active())


def is_mapped_over(tensor: Tensor) -> bool:
    """Whether the older form of vmap runs, as in autograd.grad(is_grads_batched=True)."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def differentiates_forward() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return bool(forward_ad._current_level >= 0)


def softmax_backward(gradient: Tensor, output: Tensor, dim: int) -> Tensor:
    """The gradient of softmax; output * (gradient - (gradient * output).sum(dim)) written out."""
    return torch._softmax_backward_data(gradient, output, dim, output.dtype)


def scan_operator() -> Any:
    """The operator of a loop that torch.export keeps as one; a loop that is unrolled without it."""
    return import_module("torch._higher_order_ops.scan").scan


def buffer_hooks() -> dict[int, Any]:
    """The hooks on buffers that are assigned: torch 2.9 leaves its own behind a failed export."""
    hooks: dict[int, Any] = torch.nn.modules.module._global_buffer_registration_hooks
    return hooks


def export_pass(name: str) -> ModuleType:
    """The module of a pass of torch.export; without it modes are taken to graphs of their own."""
    return import_module(f"torch._export.passes.{name}")


def load_pt2(file: Any) -> Any:
    """The programs in a file of torch.export.pt2_archive; torch.export.load has only the first."""
    return import_module("torch.export.pt2_archive._package").load_pt2(file)


def graph_opsets() -> tuple[int, int]:
    """The lowest and the highest ONNX opset that torch writes."""
    constants = import_module("torch.onnx._constants")
    return constants.ONNX_MIN_OPSET, constants.ONNX_MAX_OPSET


def archive_reader(file: Any) -> Any:
    """A reader of the zip that torch.save writes, by torch itself; zipfile reads it more freely."""
    return torch._C.PyTorchFileReader(file)
