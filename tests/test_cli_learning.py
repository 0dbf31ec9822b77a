"""`normswap recover` and `finetune`: stopped by Ctrl-C, gone on with, and by several processes."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import finished, forked, started
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from normswap import cli
from normswap.demo import digits
from normswap.fit import checkpoints

NORMSWAP = [sys.executable, "-m", "normswap"]
FINETUNE = "finetune demo:digits --data demo:digits --lr 0.001 --crop 1 --save-every 5"
RECOVER = "recover swapped --teacher demo:digits --data demo:digits --flip --save-every 5"
CONVERT = "convert demo:digits --to layer_norm --data demo:digits --samples 64 --save-every 3"


@pytest.fixture
def run(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a line in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return lambda *parts: run(*" ".join(parts).split())


def some_digits(
    split: str, whole: Callable[[str], tuple[Tensor, Tensor]] = digits.digits_data
) -> tuple[Tensor, Tensor]:
    """Of each split 200 images, for a process that shares the memory of this one."""
    x, y = whole(split)
    return x[:200], y[:200]


def spawned(folder: Path, words: list[str]) -> int:
    """That of one that a shell starts, as `forked` otherwise."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(folder)
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), number)
        os.execv(sys.executable, [*NORMSWAP, *words])

    return started(work, seconds=120)


def interrupted(
    folder: Path,
    *arguments: str,
    by: signal.Signals = signal.SIGINT,
    after: int = 1,
    begin: Callable[[Path, list[str]], int] = forked,
) -> tuple[int, str]:
    """Ctrl-C once the checkpoint of a step is there: the status, and what was said."""
    pid = begin(folder, " ".join(arguments).split())
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        facts = checkpoints.facts_in(folder / "out")
        if facts is not None and facts["step"] >= after:
            break
        time.sleep(0.002)
    os.kill(pid, by)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert (folder / "stdout").read_text() == ""
    return status, (folder / "stderr").read_text()


@pytest.mark.parametrize("command", [FINETUNE, RECOVER], ids=["finetune", "recover"])
def test_ctrl_c_saves_says_how_to_go_on_and_going_on_gives_the_same_bits(
    command: str,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = spawned if command is FINETUNE else forked
    if command is RECOVER:
        monkeypatch.setattr(digits, "digits_data", some_digits)
        assert run("convert demo:digits --to layer_norm --out swapped")[0] == 0
    status, said = interrupted(tmp_path, command, "--steps 24 --out out", begin=begin)
    assert status == 130
    last = said.splitlines()[-1]
    assert last.startswith("normswap: interrupted after step ") and "of 24; " in last
    assert "--resume" in last and "'out'" in last
    assert [file.name for file in (tmp_path / "out").iterdir()] == [checkpoints.FILE]
    before = (tmp_path / "out" / checkpoints.FILE).read_bytes()

    refused, _, said = run(command, "--steps 24 --out out")
    assert refused == 2
    assert "holds an interrupted run" in said and said.count("\n") == 1
    assert (tmp_path / "out" / checkpoints.FILE).read_bytes() == before

    assert run(command, "--steps 24 --out out --resume")[0] == 0
    whole, out, said = run(command, "--steps 24 --out whole --json")
    assert whole == 0
    names = [sorted(f.name for f in (tmp_path / each).iterdir()) for each in ("out", "whole")]
    assert names[0] == names[1] and checkpoints.FILE not in names[0]
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads(out)["training"]["steps"] == 24
    assert len([line for line in said.splitlines() if ": " in line]) <= 11


def test_a_conversion_that_recovers_goes_on_after_ctrl_c_and_kill_9_to_the_same_bits(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "digits_data", some_digits)
    command = f"{CONVERT} --recover 20 --out out"
    status, said = interrupted(tmp_path, command)
    assert status == 130
    last = said.splitlines()[-1]
    assert last.startswith("normswap: interrupted after step ") and "of 20; " in last
    assert "--resume" in last and "'out'" in last
    file = tmp_path / "out" / checkpoints.FILE
    assert list(file.parent.iterdir()) == [file]
    before = file.read_bytes()
    for other, says in (
        (command, "holds an interrupted run"),
        (f"{command} --resume --to group_norm --groups 4", "normalizations was GroupNorm"),
        (f"{CONVERT} --out out --resume", "has no effect without --recover"),
        (f"{CONVERT} --out elsewhere --recover 20 --resume", "there is no checkpoint"),
    ):
        refused, _, said = run(other)
        assert refused == 2 and says in said.splitlines()[-1], said
        assert file.read_bytes() == before
    step = checkpoints.read(file.parent)[1]["step"]
    killed = interrupted(tmp_path, f"{command} --resume", by=signal.SIGKILL, after=step + 4)
    assert killed[0] == -signal.SIGKILL
    assert step < checkpoints.read(file.parent)[1]["step"] < 20

    assert run(f"{command} --resume")[0] == 0
    whole, out, _ = run(f"{CONVERT} --recover 20 --out whole --json")
    assert whole == 0 and json.loads(out)["training"]["steps"] == 20
    names = [sorted(f.name for f in (tmp_path / each).iterdir()) for each in ("out", "whole")]
    assert names[0] == names[1] and checkpoints.FILE not in names[0]
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_torchrun_starts_two_of_which_one_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = pytest.importorskip("accelerate.state")
    # The processes are forked from this one, where a test before may have trained alone.
    state.AcceleratorState._reset_state(reset_partial_state=True)
    # What torchrun does for a script, for a function.
    meeting = {"run_id": "two", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    launch = LaunchConfig(1, 1, 2, DefaultLogsSpecs(), **meeting, start_method="fork")
    monkeypatch.setattr(cli, "main", elastic_launch(launch, cli.main))
    command = f"{FINETUNE} --batch-size 32 --steps 6 --out out --json"
    status = finished(forked(tmp_path, command.split()))
    out, said = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    assert status == 0, said
    report = json.loads(out)  # one, not two after each other
    assert report["accuracy"]["fine-tuned"] > 0.95
    assert said.count("fine-tuning: 6/6") == 1
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert not (tmp_path / "out" / checkpoints.FILE).exists()


def test_a_loss_by_name_or_of_ones_own_and_what_was_held_back_is_told(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def loss(output, target, batch):\n    return (output - target).abs().mean()\n"
    )
    assert run("convert demo:digits --to layer_norm --out swapped")[0] == 0
    for named, compared in (
        ("", "logits by Kullback"),
        ("--loss mse", "values by"),
        ("--loss mine.py:loss", "loss"),
    ):
        status, out, _ = run(RECOVER, "--steps 5 --out out --force --json", named)
        recovery = json.loads(out)["training"]["recovery"]
        assert status == 0 and recovery["compared"].startswith(compared)
        distances = dict(recovery["curve"])
        assert distances[recovery["step"]] <= distances[0] <= recovery["given"]
    for named, message in (
        ("--loss mae", "loss is 'mae'; it is kl, bce, mse, cosine, or a function"),
        ("--loss mine.py:los", "has no function 'los'; did you mean loss?"),
    ):
        status, _, said = run(RECOVER, "--steps 5 --out other", named)
        assert status == 2 and message in said and said.count("\n") == 1
        assert not (tmp_path / "other").exists()
