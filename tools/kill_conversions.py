"""Kill `normswap convert --onnx` at many moments: its folder is the old or the new, never between.

    python tools/kill_conversions.py --moments 100

Half of the moments are steps of the process on files, the last ones, among which are all in which
the folder changes; the other half are spread over its whole time. Two of three write over an older
conversion, the third writes a new folder. After each, what normswap reads is compared with both
conversions: the model's outputs, those of the ONNX file in ONNX Runtime, and the report. Then
something else is written there, after which the files themselves are compared and nothing may be
left over. Exit status 1 if anything was wrong.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import children

import normswap
from normswap.core.atomic import of_one_file, replacing
from normswap.report.onnx_model import OnnxModel

console = Console(highlight=False, markup=False, soft_wrap=True)
OLD, NEW, NONE = "old", "new", "none"
FILES = ("model.safetensors", "recipe.json", "report.json", "report.html", "model.onnx")


def convert(method: str, out: Path) -> None:
    """The command, in this process and without a word."""
    children.command("convert", "demo:digits", "--to", method, "--onnx", "--out", str(out))


def outputs(folder: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model and the ONNX file in `folder` compute."""
    with torch.no_grad():
        return {
            "model": normswap.load(folder).eval()(x),
            "onnx": OnnxModel(folder / "model.onnx")(x),
        }


def seen(folder: Path, known: dict[str, dict[str, torch.Tensor]], x: torch.Tensor) -> str:
    """Which conversion a reader finds in `folder`; more than one name where it is a mixture."""
    if not folder.exists():
        return NONE
    found = outputs(folder, x)
    names = set()
    for part, values in found.items():
        names |= {name for name, each in known.items() if torch.equal(each[part], values)} or {"?"}
    report = json.loads(of_one_file(folder / "report.json", Path.read_bytes))
    names.add(OLD if "group_norm" in report["plan"]["passes"][0] else NEW)
    return " and ".join(sorted(names))


def main() -> None:
    """Kill, look, write again and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    count = parser.parse_args().moments
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8)
    found: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        assert children.child(lambda: convert("group_norm", home / OLD), seconds=600) == 0
        shutil.copytree(home / OLD, home / "over")
        steps, seconds = {}, 0.0
        for before, folder in ((NONE, home / NEW), (OLD, home / "over")):
            work = partial(convert, "layer_norm", folder)
            steps[before], seconds = children.steps_and_seconds(work, home / "steps")
            console.print(f"over {before}: {steps[before]} steps on files, {seconds:.1f} s")
        known = {name: outputs(home / name, x) for name in (OLD, NEW)}
        for moment in track(range(count), "killing", console=console):
            folder = home / str(moment) / "out"
            folder.parent.mkdir()
            before = OLD if moment % 3 else NONE
            if before == OLD:
                shutil.copytree(home / OLD, folder)
            at = None if moment % 2 else max(steps[before] - moment // 2, 1)
            work = partial(convert, "layer_norm", folder)
            was_killed = children.killed(work, at, seconds * moment / count)
            mixed = len({_generation(folder, home, name) for name in FILES} - {None}) > 1
            now = seen(folder, known, x)
            wanted = {before, NEW} if was_killed else {NEW}
            problem = "" if now in wanted else f"a reader sees: {now}"
            if not problem and now != NONE:
                with replacing(folder / "later") as scratch:
                    scratch.write_bytes(b"")
                if {_generation(folder, home, name) for name in FILES} != {now}:
                    problem = "its files are not of one conversion after the next writer"
                elif list(folder.glob(".normswap-*")):
                    problem = "something is left over"
            if problem:
                wrong += 1
                console.print(f"moment {moment}, step {at}, over {before}: {problem}")
            found[f"over {before}: {now}" + (", moved in part when killed" if mixed else "")] += 1
            shutil.rmtree(folder.parent)
    for what, times in sorted(found.items()):
        console.print(f"{times:4} {what}")
    console.print(f"{count} moments, {wrong} wrong")
    sys.exit(bool(wrong))


def _generation(folder: Path, home: Path, name: str) -> str | None:
    """Which conversion the file `name` itself is of, in the folder and not in a journal."""
    path = folder / name
    if not path.is_file():
        return None
    if (home / OLD / name).read_bytes() == path.read_bytes():
        return OLD
    return NEW


if __name__ == "__main__":
    main()
