"""Kill trainings at many moments: going on with each gives what one gives that nobody disturbed.

    python tools/kill_trainings.py --moments 100

`normswap finetune` and `normswap convert --recover`, in turn, on small data. Half of the moments
are steps of the process on files, the other half are spread over its whole time; every third run is
killed once more while it goes on. What lies in the folder then is a whole checkpoint, the whole
result or nothing. The same command with --resume, or without it where there is no checkpoint yet,
has to end with the same bits in files of the same names, and nothing may be left over. Exit status
1 if anything was wrong.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import children

import normswap
from normswap.core.errors import NormswapError
from normswap.core.journal import located
from normswap.fit import checkpoints

console = Console(highlight=False, markup=False, soft_wrap=True)
NET = """
from torch import nn

def net():
    first = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(64, 3))
"""
DATA = "--data data.npz --input 2x1x4x4 --save-every 3 --crop 1 --flip"
COMMANDS = {
    "finetune": f"finetune net.py:net {DATA} --steps 10 --batch-size 8 --momentum 0.9",
    "recover": f"convert net.py:net {DATA} --to layer_norm --samples 16 --recover 10",
}
NOTHING, CHECKPOINT, RESULT = "nothing", "a checkpoint", "the result"


def prepare(home: Path) -> None:
    """What the commands read, in the folder in which they run."""
    os.chdir(home)
    Path("net.py").write_text(NET, encoding="utf-8")
    x = np.random.default_rng(0).normal(size=(40, 1, 4, 4)).astype("float32")
    np.savez("data.npz", x=x, y=np.arange(40) % 3)


def train(kind: str, out: Path, *, resume: bool = False) -> None:
    """The command, in this process and without a word."""
    words = [*COMMANDS[kind].split(), "--out", str(out), *(["--resume"] if resume else [])]
    children.command(*words)


def seen(folder: Path, expected: Path) -> str:
    """What a reader finds in `folder` after a kill.

    Raises:
        NormswapError, AssertionError: it is neither whole nor nothing.
    """
    if checkpoints.facts_in(folder) is not None:
        step = checkpoints.read(folder)[1]["step"]
        assert not (folder / "model.safetensors").exists(), "a checkpoint beside a result"
        assert step in (1, 3, 6, 9, 10), step
        return CHECKPOINT
    if not located(folder / "model.safetensors").is_file():
        return NOTHING
    assert same(located(folder / "model.safetensors"), expected / "model.safetensors")
    return RESULT


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same bits under the same names."""
    tensors, wanted = load_file(one), load_file(other)
    return tensors.keys() == wanted.keys() and all(
        torch.equal(tensors[name], wanted[name]) for name in wanted
    )


def disturbed(
    kind: str, folder: Path, kills: list[tuple[int | None, float]], expected: Path
) -> list[str]:
    """Train into `folder`, killed at each of `kills`, and then to the end; what was seen between.

    Raises:
        NormswapError, AssertionError: something was left that should not be there, or differs.
    """
    states = [NOTHING]
    for step, seconds in kills:
        work = partial(train, kind, folder, resume=states[-1] == CHECKPOINT)
        if states[-1] != RESULT:  # which a run that was too quick to be killed has as well
            killed = children.killed(work, step, seconds)
            states.append(seen(folder, expected))
            assert killed or states[-1] == RESULT
    if states[-1] == RESULT:  # of which a journal may hold a part, until the next one writes
        normswap.save(normswap.load(folder, source="net.py:net"), folder)
    else:
        work = partial(train, kind, folder, resume=states[-1] == CHECKPOINT)
        assert children.child(work, seconds=600) == 0
    names, wanted = ({each.name for each in path.iterdir()} for path in (folder, expected))
    assert names == wanted, f"the files are {names}, not {wanted}"
    assert same(folder / "model.safetensors", expected / "model.safetensors"), "other bits"
    left = [each.name for each in folder.parent.iterdir() if each != folder]
    assert not left, f"left over beside the folder: {left}"
    return states[1:]


def main() -> None:
    """Kill, look, go on, compare and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    count = parser.parse_args().moments
    torch.set_num_threads(1)
    random, found, wrong = Random(0), Counter[str](), 0
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        prepare(home)
        steps, seconds = {}, {}
        for kind in COMMANDS:
            work = partial(train, kind, home / kind)
            steps[kind], seconds[kind] = children.steps_and_seconds(work, home / "steps")
            console.print(f"{kind}: {steps[kind]} steps on files, {seconds[kind]:.1f} s")
        for moment in track(range(count), "killing", console=console):
            kind = list(COMMANDS)[moment % 2]
            kills = [
                (random.randint(1, steps[kind]), 0.0)
                if random.random() < 0.5
                else (None, random.uniform(0, seconds[kind]))
                for _ in range(2 if moment % 3 == 0 else 1)
            ]
            folder = home / str(moment) / "out"
            folder.parent.mkdir()
            try:
                states = disturbed(kind, folder, kills, home / kind)
                found[f"{kind}: {', then '.join(states)}"] += 1
            except (NormswapError, AssertionError) as error:
                wrong += 1
                console.print(f"moment {moment}, {kind} killed at {kills}: {error}")
            shutil.rmtree(folder.parent)
    for what, times in sorted(found.items()):
        console.print(f"{times:4} {what}")
    console.print(f"{count} moments, {wrong} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
