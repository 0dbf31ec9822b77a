"""A run that was stopped at any moment, and goes on, ends with the bits of one that was not."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from children import finished, started
from learners import (
    EVER,
    Paced,
    batches,
    learned,
    loader,
    moved_and_mirrored,
    net,
    same_bits,
)

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit import checkpoints

Data = Callable[[], Iterable[Any]]
# What is run, on what, how.
RUNS: dict[str, tuple[str, Data, dict[str, Any]]] = {
    "frozen": ("finetune", loader, {}),
    "tune mode": ("finetune", moved_and_mirrored, {"statistics": "tune", "accumulate": 3}),
    "batch statistics": ("finetune", loader, {"statistics": "update", "clip": 0.5}),
    "bf16": ("finetune", loader, {"precision": "bfloat16", "accumulate": 2}),
    "fp16": ("finetune", loader, {"precision": "float16"}),
    "growing rate": ("finetune", loader, {"schedule": "exponential", "weight_decay": 1e-3}),
    "recovered": ("recover", loader, {"accumulate": 2}),
    "recovered in bf16": ("recover", moved_and_mirrored, {"precision": "bfloat16"}),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*which are too few")


class Stopped(BaseException):
    """Not one of those that are told as a fault of the data."""


def stop() -> None:
    raise Stopped


@pytest.mark.parametrize(("kind", "data", "options"), RUNS.values(), ids=RUNS)
def test_a_run_that_failed_goes_on_to_the_same_bits(
    kind: str, data: Data, options: dict[str, Any], tmp_path: Path
) -> None:
    expected = learned(kind, Paced(data(), EVER, stop), **options)
    looked_at = 1 if kind == "finetune" else 5  # batches, before the run
    with pytest.raises(Stopped):
        learned(kind, Paced(data(), looked_at + 7, stop), tmp_path, **options)
    step = checkpoints.read(tmp_path)[1]["step"]
    assert 0 < step < 9
    torch.manual_seed(99)
    again = Paced(data(), EVER, stop)
    assert same_bits(learned(kind, again, tmp_path, resume=True, **options), expected)


def wait() -> None:
    time.sleep(0.2)


def _until_killed(kind: str, folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    # Slow from the sixth batch on, so that it is surely killed in the middle.
    learned(kind, Paced(loader(2), 6, wait), folder, **options)


@pytest.mark.parametrize("kind", ["finetune", "recover"])
def test_a_killed_run_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    options = {"steps": 12, "accumulate": 2, "precision": "bfloat16"}
    threads = torch.get_num_threads()
    running = started(partial(_until_killed, kind, tmp_path, options), seconds=100)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        facts = checkpoints.facts_in(tmp_path)
        if facts is not None and facts["step"] >= 4:
            break
        time.sleep(0.02)
    os.kill(running, signal.SIGKILL)
    assert finished(running) == -signal.SIGKILL
    facts = checkpoints.facts_in(tmp_path)
    assert facts is not None and 4 <= facts["step"] < 12
    try:
        torch.set_num_threads(1)
        expected = learned(kind, loader(), **options)
        assert not same_bits(expected, learned(kind, loader(), **{**options, "steps": 11}))
        found = learned(kind, loader(2), tmp_path, resume=True, **options)
        assert same_bits(found, learned(kind, loader(2), **options))
    finally:
        torch.set_num_threads(threads)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_after_the_step_and_says_how_to_go_on(tmp_path: Path) -> None:
    expected = learned("finetune", loader())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as error:
        learned("finetune", Paced(loader(), 6, press), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    said = str(error.value)
    assert said.startswith("interrupted after step 6 of 9; ") and str(tmp_path) in said
    assert same_bits(learned("finetune", loader(), tmp_path, resume=True), expected)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        press()
        press()

    with pytest.raises(KeyboardInterrupt) as error:
        learned("finetune", Paced(loader(), 6, twice), tmp_path)
    assert not error.value.args


def test_ctrl_c_reaches_the_workers_of_a_loader_too(tmp_path: Path) -> None:
    """A terminal sends it to all of them; the run has to save all the same."""
    expected = learned("finetune", loader(2))

    def press_for_all() -> None:
        for child in torch.multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)  # type: ignore[arg-type]
        press()

    with pytest.raises(KeyboardInterrupt, match="interrupted after step 3"):
        learned("finetune", Paced(loader(2), 3, press_for_all), tmp_path)
    assert same_bits(learned("finetune", loader(2), tmp_path, resume=True), expected)


def test_a_run_outside_of_the_main_thread_works() -> None:
    done: list[bool] = []
    thread = threading.Thread(
        target=lambda: done.append(bool(learned("finetune", batches(), steps=1)))
    )
    thread.start()
    thread.join()
    assert done == [True]


def interrupted(folder: Path, **options: Any) -> None:
    with pytest.raises(Stopped):
        learned("finetune", Paced(loader(), 6, stop), folder, **options)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"lr": 0.02}, "lr was 0.01, is 0.02"),
    "momentum": ({"momentum": 0.5}, "momentum was 0.9, is 0.5"),
    "steps": ({"steps": 10}, "steps was 9, is 10"),
    "statistics": ({"statistics": "tune"}, "statistics was eval, is tune"),
    "accumulate": ({"accumulate": 2}, "accumulate was 1, is 2"),
    "data": ({"data": batches()[:2]}, "resume with the data it began with"),
    "batches": ({"data": batches(4)}, "resume with the data it began with"),
    "model": ({"model": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 4))}, "model"),
    "type": ({"model": net().double()}, "is of another model: blocks.0.bn.bias differs"),
    "no resume": ({"resume": False}, "holds an interrupted run, at step 4: resume it, or remove"),
    "no checkpoint": ({"checkpoint": "elsewhere"}, "there is no checkpoint in 'elsewhere'"),
}


@pytest.mark.parametrize(("changed", "says"), OTHERS.values(), ids=OTHERS)
def test_another_run_is_not_mixed_with_this_one(
    changed: dict[str, Any], says: str, tmp_path: Path
) -> None:
    interrupted(tmp_path)
    file = (tmp_path / checkpoints.FILE).read_bytes()
    given = {"model": net(), "data": loader(), "steps": 9, "checkpoint": tmp_path, "resume": True}
    given |= changed
    model, data = given.pop("model"), given.pop("data")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NormswapError) as error:
        ns.finetune(model, data, **given)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert same_bits(before, model.state_dict())
    assert (tmp_path / checkpoints.FILE).read_bytes() == file


def test_a_refused_recovery_leaves_the_student_uncalibrated(tmp_path: Path) -> None:
    interrupted(tmp_path)
    teacher = net().eval()
    student = ns.convert(teacher, "layer_norm", inputs=batches()[0][0])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(NormswapError, match="holds an interrupted run"):
        ns.recover(student, teacher, loader(), steps=2, checkpoint=tmp_path)
    assert same_bits(before, student.state_dict())


def test_a_finished_run_is_in_nobodys_way(tmp_path: Path) -> None:
    expected = learned("finetune", loader(), tmp_path)
    assert same_bits(learned("finetune", loader(), tmp_path, resume=True), expected)
    assert same_bits(learned("finetune", loader(), tmp_path, steps=9), expected)
    learned("finetune", loader(), tmp_path, steps=10)


def test_a_run_that_never_began_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Or it would be refused when it is called again, rightly."""
    unlabelled = [x for x, _ in batches()]
    with pytest.raises(NormswapError, match="the data have no labels"):
        learned("finetune", unlabelled, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_of_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    seen: list[int] = []
    data = Paced(batches(), 0, lambda: seen.append(1))
    with pytest.raises(NormswapError, match="cannot write to"):
        learned("finetune", data, tmp_path / "file" / "below")
    assert len(seen) <= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"precision": "fp8"}, "use float32, bfloat16 or float16"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"resume": True}, "name the folder"),
        ({"lr": 0.0}, "lr 0 must be above 0"),
        ({"momentum": 1.0}, "momentum 1 from 0 to below 1"),
        ({"weight_decay": -1.0}, "weight_decay -1 not below it"),
        ({"statistics": "frozen"}, "it is eval or tune or update"),
    ],
)
def test_numbers_that_make_no_run_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(NormswapError, match=says):
        learned("finetune", batches(), **options)
