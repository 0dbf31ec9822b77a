"""What every test needs: a torchvision that imports without its operators, and a fixed seed.

And `run`, the command line in this process.
"""

import functools
import gc
import importlib
import logging
import sys
from collections.abc import Callable

import pytest
import torch

from normswap import cli


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


gc.disable()  # until all tests are collected: what was imported stays
_keep: list[torch.library.Library] = []  # a Library that is collected takes its operators along
_define_missing_torchvision_operators()


def pytest_collection_finish() -> None:
    """torch.export makes many objects, for which Python would look at all that is loaded by now
    again and again: a fifth of the time of these tests.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(200_000, 50, 1000)
    # pytest listens to loggers that do not propagate, and torch writes a trace once one listens.
    logging.getLogger("torch.__trace").propagate = True
    _keep_tables_of_export()
    _forget_seeds_of_absent_devices()


def _keep_tables_of_export() -> None:
    """Some hundred exports would each make the 500 translations of torch.onnx again, and list the
    operators of every namespace that could be decomposed.
    """
    try:
        registry = importlib.import_module(
            "torch.onnx._internal.exporter._registration"
        ).ONNXRegistry
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
        operators, name = torch._export.utils, "_collect_all_valid_cia_ops_for_namespace"
        setattr(operators, name, functools.cache(getattr(operators, name)))
    except (ImportError, AttributeError):  # they are private, and only cost time
        pass


def _forget_seeds_of_absent_devices() -> None:
    """torch.manual_seed keeps a seed for each kind of accelerator until that is used, with the
    stack of calls as text, which takes a hundred times what the rest does.
    """
    if not torch.accelerator.is_available():
        for device in (torch.cuda, torch.mtia, torch.xpu):
            device.manual_seed_all = lambda seed: None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw those of a report takes as long as many a command; report/test_page.py has them."""
    monkeypatch.setattr("normswap.report.pictures._drawn", lambda *_: "")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `normswap` with these words in this process: its exit status, stdout and stderr.

    A file whose commands need a folder, or a terminal of some width, has a `run` of this one.
    """

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["normswap", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return command
