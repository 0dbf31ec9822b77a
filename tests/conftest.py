"""What every test needs: a torchvision that imports without its operators, and a fixed seed."""

import functools
import gc
import importlib

import pytest
import torch


def _define_missing_torchvision_operators() -> None:
    """A torchvision built for another torch fails on import unless these two schemas exist.

    Only architectures are built from it here, so the operators need no kernel.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(library)
        importlib.import_module("torchvision")


_keep: list[torch.library.Library] = []  # a Library that is collected takes its operators along
_define_missing_torchvision_operators()


def pytest_collection_finish() -> None:
    """torch.export makes many objects, for which Python would look at all that is loaded by now
    again and again: a fifth of the time of these tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)
    _keep_onnx_translations()


def _keep_onnx_translations() -> None:
    """torch.onnx reads the code of 500 translations again in each of some hundred exports."""
    try:
        apis = importlib.import_module(
            "torch.onnx._internal.exporter._registration"
        ).onnxscript_apis
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)
    except (ImportError, AttributeError):  # they are private, and only cost time
        pass


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
