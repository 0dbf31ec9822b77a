"""A training that is killed goes on to the same bits; one that fails leaves what it can go on from.

And one that blew up leaves nothing: going on with it, it would blow up again.
"""

import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from children import contents, die, finished, started, steps_and_seconds
from failing_data import FailingData
from torch import nn
from torch.utils.data import DataLoader

import normswap as ns
from normswap import cli
from normswap.core.errors import NormswapError
from normswap.fit import checkpoints
from normswap.fit.distill import BlewUp
from normswap.fit.evaluate import accuracy

TOOL = Path(__file__).parents[2] / "tools" / "kill_trainings.py"
_GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 1, 4, 4, generator=_GENERATOR), torch.arange(24) % 3
GOOD = list(zip(X.split(8), Y.split(8), strict=True))


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_trainings", TOOL)
    assert spec is not None and spec.loader is not None
    monkeypatch.syspath_prepend(str(TOOL.parent))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    module.prepare(tmp_path)
    return module


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("kind", ["finetune", "recover"])
def test_a_command_that_is_killed_goes_on_to_the_same_bits(
    kind: str, tool: ModuleType, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    steps, _ = steps_and_seconds(lambda: tool.train(kind, whole), tmp_path / "steps")
    draw, states = Random(kind), []
    # Between the first checkpoints, and while the result takes their place.
    for number, drawn in enumerate((draw.randint(steps // 3, steps // 2), steps - 3)):
        (tmp_path / str(number)).mkdir()
        folder = tmp_path / str(number) / "out"
        states += tool.disturbed(kind, folder, [(drawn, 0.0)], whole)
    assert states == [tool.CHECKPOINT, tool.RESULT]


def net() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(64, 3))


class Failing:
    """Good batches, of which the seventh is none."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Any:
        for batch in GOOD:
            self.read += 1
            if self.read == 7:
                raise OSError("the disk is gone")
            yield batch


def test_a_run_whose_data_fail_goes_on_once_they_are_mended(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 9, "save_every": 2}
    whole = ns.finetune(net(), GOOD, **options).state_dict()
    with pytest.raises(NormswapError, match="the disk is gone"):
        ns.finetune(net(), Failing(), checkpoint=tmp_path / "run", **options)
    assert contents(tmp_path).keys() == {"run", f"run/{checkpoints.FILE}"}
    with pytest.raises(NormswapError, match="holds an interrupted run"):
        ns.finetune(net(), GOOD, checkpoint=tmp_path / "run", **options)
    with pytest.raises(NormswapError, match=r"there is no .*model\.safetensors"):
        ns.load(tmp_path / "run", source=net)  # it is not mistaken for a result
    model = ns.finetune(net(), GOOD, checkpoint=tmp_path / "run", resume=True, **options)
    assert all(torch.equal(each, whole[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize("verb", ["finetune", "recover"])
@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_blew_up_leaves_no_checkpoint(verb: str, there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if there:
        ns.save(net(), folder)
    before = contents(tmp_path)
    options: dict[str, Any] = {"steps": 40, "lr": 1e5, "save_every": 1, "checkpoint": folder}
    with pytest.raises(BlewUp):
        if verb == "finetune":
            ns.finetune(net(), GOOD, statistics="update", **options)
        else:
            teacher = net().eval()
            student = ns.convert(teacher, "layer_norm", inputs=X[:2])
            ns.recover(student, teacher, GOOD, **options)
    assert contents(tmp_path) == before


def test_the_command_says_so_in_one_line_and_can_be_tried_again(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(tmp_path)
    for rate, status in (("100000", 2), ("0.01", 0)):
        words = [*tool.COMMANDS["finetune"].split(), "--lr", rate, "--out", "out"]
        monkeypatch.setattr(sys, "argv", ["normswap", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = [line for line in capsys.readouterr().err.splitlines() if "normswap: " in line]
        assert ended.value.code == status, said
        if status:
            assert len(said) == 1 and "try a third of it" in said[0], said
            assert contents(tmp_path) == before
    assert (tmp_path / "out" / "model.safetensors").exists()


# --- Ctrl-C in one of several processes -----------------------------------------------------------


class Late:
    """Good batches, of which the eighth of the process 1 ends in `then`."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then, self.read = then, 0

    def __iter__(self) -> Any:
        for batch in GOOD:
            self.read += 1
            if self.read == 8 and os.environ["RANK"] == "1":
                self.then()
            yield batch


def pressed() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def pressed_twice() -> None:
    pressed()
    pressed()


# What ends one of two processes, and what both have to say: itself, and the other.
ENDED: dict[str, tuple[Callable[[], None], str, str]] = {
    "Ctrl-C": (
        pressed,
        "StopRequested: interrupted after step",
        "StopRequested: interrupted after step",
    ),
    "Ctrl-C twice": (pressed_twice, "KeyboardInterrupt", "another of the 2 processes"),
    "a kill": (die, "", "another of the 2 processes"),
}


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*which are too few")
@pytest.mark.parametrize("kind", ENDED)
def test_no_process_waits_for_one_that_is_interrupted(kind: str, tmp_path: Path) -> None:
    state = pytest.importorskip("accelerate.state")
    then, *wanted = ENDED[kind]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def work(rank: int) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        os.environ.update(here, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
        # A test before this one may have used accelerate, which a fork would go on with.
        state.AcceleratorState._reset_state(reset_partial_state=True)
        try:
            ns.finetune(net(), Late(then), steps=30, save_every=3, checkpoint=tmp_path / "run")
        except BaseException as error:
            said = tmp_path / str(rank)
            said.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")

    begun = time.monotonic()
    for pid in [started(partial(work, rank), seconds=100) for rank in (1, 0)]:
        finished(pid)
    assert time.monotonic() - begun < 60
    for rank, says in zip((1, 0), wanted, strict=True):
        assert not says or says in (tmp_path / str(rank)).read_text(encoding="utf-8")
    assert checkpoints.read(tmp_path / "run")[1]["step"] >= 3  # from which all can go on


def loader(then: Callable[[], None]) -> DataLoader[Any]:
    def then_wait() -> None:
        then()
        time.sleep(0.1)  # a signal comes between two lines of Python

    data = FailingData(X, Y, then_wait)
    return DataLoader(data, 8, num_workers=2, multiprocessing_context="fork")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_ctrl_c_in_one_of_several_workers_does_not_leave_the_others_waiting() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = time.monotonic()
    try:
        with pytest.raises(NormswapError, match=r"failed at batch .* DataLoader worker"):
            accuracy(net(), loader(pressed))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 40
