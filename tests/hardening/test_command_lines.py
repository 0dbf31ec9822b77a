"""Absurd values on the command line: refused in one line each, and nothing on the disk changes."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import inf, nan
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import typer

import normswap
from normswap.cli.app import app
from normswap.cli.options import check_number, method_options, numbers
from normswap.cli.steps import place
from normswap.core.errors import NormswapError
from normswap.core.shown import shown
from normswap.norms.registry import check_options
from normswap.source import parse_input
from normswap.store import resolve

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, 3)).eval(), torch.randn(2, 1, 4, 4)

def centered():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(2, 4)
"""
FOLDER = ["saved", "--source", "nets.py:net"]
LEARN = [*FOLDER, "--teacher", "nets.py:net", "--data", "d.npz"]
# For each command a line that it carries out, but for the value that is put in.
LINES = {
    "inspect": ["nets.py:net"],
    "advise": ["nets.py:net", "--data", "d.npz"],
    "convert": ["nets.py:net", "--to", "group_norm", "--data", "d.npz"],
    "fold": ["nets.py:net"],
    "center": ["nets.py:centered"],
    "fold-gains": ["nets.py:centered"],
    "rotate": ["nets.py:centered"],
    "rescale": ["nets.py:net", "--data", "d.npz"],
    "absorb-input": ["nets.py:net", "--mean", "0.5", "--std", "0.5"],
    "freeze": ["nets.py:net"],
    "parametrize": ["nets.py:net", "--method", "weight_norm"],
    "bake": FOLDER,
    "calibrate": LEARN,
    "recover": [*LEARN, "--steps", "1"],
    "finetune": ["nets.py:net", "--data", "d.npz", "--steps", "1"],
    "export": ["nets.py:net"],
    "validate": ["out/model.onnx", "nets.py:net"],
    "compare": ["nets.py:net", "nets.py:net"],
}
LONG = "a" * 5000
NO_PATH = ["", "nonsense", LONG, "-", "no/\x1b[31m", "nets.py/below", "/", "\udcff", "[/bold]"]
NO_NUMBER = ["", "nan", "inf", "x", "1,,2", "1e400", "1e39", "-1e300,1", "1;2", "[1]"]
BY_TYPE: dict[Any, list[str]] = {
    int: ["1e30", "-1", "9" * 26, "9" * 5000, "nan", "", "1.5", "0x10", "[1]", "\x1b[31m"],
    float: ["nan", "inf", "-inf", "-1", "1e30", "1e400", "", "x", "1,2"],
    str: ["", "nonsense", "-1", "nan", LONG, "\x1b[31m", "[/bold]", "{}"],
}
BY_NAME = {
    "model": NO_PATH,
    "path": NO_PATH,
    "a": NO_PATH,
    "b": NO_PATH,
    "teacher": NO_PATH,
    "checkpoint": NO_PATH,
    "checkpoint_b": NO_PATH,
    "data": [*NO_PATH, "demo:", "d.npz:", "nets.py:net"],
    "test": [*NO_PATH, "demo:nothing"],
    "source": [*NO_PATH, "nets.py:", "nets.py:nothing", "saved"],
    "source_b": NO_PATH,
    "out": ["", "nets.py", "nets.py/below", f"{LONG}", "d.npz/\x1b[31m"],
    "mean": NO_NUMBER,
    "std": [*NO_NUMBER, "0", "-1", "1e-60", "0,1"],
    "input": [
        *("", "0", "1x", "x1", "-1x3", "nan", "1x1x4x4x", "float99:1x1x4x4", "9" * 20, "9" * 5000),
        *("1x1x99999999x99999999", "1x0x4x4", "1x" * 300 + "1", "int64:1x1x4x4"),
    ],
    "include": ["nonsense", "[", "\x1b[31m", LONG],
    "limit": ["", "x", "nan", "0", "-1", "1e400", "1,2", "int8", LONG],
    "per": ["", "nonsense", "-1", LONG],
    "output_names": ["", ",", "a,b", "-1", "\x1b[31m", "[/bold]", "a b", "input"],
    "margin": ["nan", "inf", "0", "-1", "0.5", "1e30", "", "x"],
    "groups": ["", "x", "-1", "0", "1.5", "1e30", "9" * 5000, "3"],
    "device": ["", "meta", "nonsense", "cuda:99", "cuda:-1", "-1", "0,1", "\x1b[31m", LONG],
    "set": [
        *(
            "",
            "=",
            "a",
            "=1",
            "__class__=1",
            "num_features=3",
            "nonsense=1",
            "eps",
            "eps=",
            "eps=x",
        ),
        *("eps=x", "eps=nan", "eps=NaN", "eps=Infinity", "eps=1e400", "eps=-1", "eps=[]", "eps={}"),
        *('eps={"a":{"b":[1]}}', "eps=[[[1]]]", f"eps={'[' * 5000}", f"eps={'9' * 5000}"),
        *("eps=true", 'eps="\\u001b[31m"', "eps=\ud800", "eps=null"),
    ],
}
# What is a value, of those above.
MEANT = {("seed", "-1"), ("groups", "-1"), ("set", "eps=null")}


def options(command: str) -> Iterator[tuple[str, str | None, list[str]]]:
    """The name, the flag (None of an argument) and absurd values of all that `command` takes."""
    callbacks = {each.callback.__name__: each.callback for each in app.registered_commands}
    callback = callbacks[command.replace("-", "_")]
    for name, hint in get_type_hints(callback, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, said, *_ = get_args(hint)
            texts = str(kind)
            known = next((each for each in (int, float) if each.__name__ in texts), str)
            is_argument = isinstance(said, typer.models.ArgumentInfo)
            flag = None if is_argument else f"--{name.replace('_', '-')}"
            if kind is not bool and name != "exclude":  # what it names need not be there
                yield name, flag, BY_NAME.get(name) or BY_TYPE[known]


def absurd(command: str) -> Iterator[list[str]]:
    """Lines of `command` with one absurd value each, for each option another than in the others."""
    turn = list(LINES).index(command)
    found = list(options(command))
    count = sum(flag is None for _, flag, _ in found)
    places = iter(range(count))
    for name, flag, values in found:
        given, named = LINES[command][:count], LINES[command][count:]
        if flag is None:
            place = next(places)
        elif flag in named:
            del named[named.index(flag) : named.index(flag) + 2]
        refused = [value for value in values if (name, value) not in MEANT]
        for value in (refused[turn % len(refused)],):
            words = [] if flag is None else [f"{flag}={value}"]
            if flag is None:
                given[place] = value
            yield [command, *named, *words, "--", *given]


def files(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    path = tmp_path_factory.mktemp("absurd")
    (path / "nets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(20, 1, 4, 4)).astype("float32")
    np.savez(path / "d.npz", x=x, y=np.arange(20) % 3)
    model, inputs = resolve(f"{path}/nets.py:net").model, torch.randn(2, 1, 4, 4)
    normswap.save(normswap.convert(model, "group_norm", inputs=inputs), path / "saved")
    normswap.export(model, inputs, path / "out/model.onnx")
    return path


@pytest.fixture
def run(
    run: Callable[..., tuple[int, str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(folder)
    return run


def test_every_command_is_tried() -> None:
    named = {each.callback.__name__.replace("_", "-") for each in app.registered_commands}
    assert named == {*LINES, "methods"}  # which takes no value


@pytest.mark.parametrize("command", LINES)
def test_an_absurd_value_is_refused_in_one_line(command: str, folder: Path, run) -> None:
    before, faults = files(folder), []
    for words in absurd(command):
        status, out, err = run(*words)
        lines = [line for line in err.splitlines() if "/1 loss" not in line]
        told = len(lines) == 1 and lines[0].startswith("normswap: ") and len(lines[0]) < 900
        told = told and lines[0].isprintable() and "unexpected error" not in err
        if status != 2 or out or not told:
            faults.append(f"{shown(words, 150)} -> {status} {shown(out, 99)} {shown(err, 200)}")
        assert files(folder) == before, words
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("text", BY_NAME["input"])
def test_no_absurd_input_is_made(text: str) -> None:
    if text in ("int64:1x1x4x4", "1x" * 300 + "1"):  # which only this model does not take
        return
    with pytest.raises(NormswapError, match="input"):
        parse_input(text)


@pytest.mark.parametrize("text", BY_NAME["mean"])
def test_no_absurd_mean_is_read(text: str) -> None:
    with pytest.raises(NormswapError, match="--mean takes numbers such as"):
        numbers("--mean", text)


@pytest.mark.parametrize("number", [nan, inf, -inf, -1.0, 1e30])
def test_no_absurd_rate_is_taken(number: float) -> None:
    for zero in (False, True):
        with pytest.raises(NormswapError, match="and at most 1e"):
            check_number("--lr", number, zero=zero)


@pytest.mark.parametrize("device", BY_NAME["device"])
def test_no_model_moves_to_an_absurd_device(device: str) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(NormswapError, match="cannot use --device") as refused:
        place(device, model)
    assert "\n" not in str(refused.value) and model.weight.device.type == "cpu"


VALUES = [
    *(f"{digits}" for digits in ("-1", "1e30", "1e308", "5e-324", "9" * 26, "2147483648", "3.5")),
    *("nan", "NaN", "null", "true", "[]", "{}", "[[1]]", '{"a":{"b":1}}', '"x"', '["a","a"]'),
    *('["\\u001b"]', "1", "0"),
]


@pytest.mark.parametrize("name", sorted(normswap.methods()))
def test_an_option_of_a_method_is_refused_or_taken(name: str) -> None:
    method = normswap.methods()[name]
    for option in (*method.options, "eps", "affine"):
        for value in VALUES:
            try:
                given = method_options(None, None, [f"{option}={value}"])
                if method.kind in ("activation", "input"):
                    normswap.create(name, 4, **given)
                else:
                    check_options(method, given)
            except NormswapError as error:
                assert str(error).isprintable() and len(str(error)) < 900


# By the option: a line of a command in which it has no effect, and what it needs there.
ALONE = {
    "--samples 5": ("convert nets.py:net --to group_norm", "--data"),
    "--mean 0.5": ("convert nets.py:net --to group_norm", "--data or --test"),
    "--std 0.5": ("compare nets.py:net nets.py:net", "--data or --test"),
    "--mean 0": ("export nets.py:net", "--data"),
    "--std 1": ("advise nets.py:net", "--data or --test"),
    "--test d.npz": ("advise nets.py:net", "--data"),
    "--groups auto": ("convert nets.py:net --to group_norm", "--data"),
    "--recover 3": ("convert nets.py:net --to group_norm --test d.npz", "--data"),
    "--crop 1": ("convert nets.py:net --to group_norm --data d.npz", "--recover"),
    "--flip": ("convert nets.py:net --to group_norm --data d.npz --recover 0", "--recover"),
    "--save-every 7": ("convert nets.py:net --to group_norm --data d.npz", "--recover"),
    "--resume": ("convert nets.py:net --to group_norm --data d.npz", "--recover"),
    "--opset 18": ("convert nets.py:net --to group_norm --dry-run", "--onnx"),
    "--opset 19": ("fold nets.py:net", "--onnx"),
    "--target generic": ("center nets.py:centered", "--onnx"),
    "--target onnxruntime": ("absorb-input nets.py:net", "--onnx"),
    "--samples 3": ("export nets.py:net", "--data"),
    "--samples 4": (
        "export nets.py:net --data d.npz",
        "--precision float16 or --precision int8 or --precision int8_weight_only or "
        "--precision int4_weight_only",
    ),
    "--assume-example": ("freeze nets.py:net", "--mode tune"),
}


@pytest.mark.parametrize("option", ALONE)
def test_an_option_that_would_be_ignored_is_refused(option: str, folder: Path, run) -> None:
    line, needed = ALONE[option]
    before = files(folder)
    status, out, err = run(*line.split(), *option.split())
    said = option if option == "--groups auto" else option.split()[0]
    told = f"normswap: {said} has no effect without {needed}; add that, or leave {said} out\n"
    assert (status, out, err) == (2, "", told)
    assert files(folder) == before


def test_it_is_taken_where_what_it_needs_is_there_and_where_no_such_option_is(run) -> None:
    for line in (
        "convert nets.py:net --to group_norm --test d.npz --mean 0.5 --std 0.5 --dry-run",
        "convert nets.py:net --to group_norm --recover 0 --crop 0 --dry-run",
        "convert nets.py:net --to group_norm --groups auto --data d.npz --samples 5 --dry-run",
        "fold nets.py:net --onnx --opset 18 --target onnxruntime --dry-run",
        "freeze nets.py:net --mode tune --assume-example --dry-run",
        "fold nets.py:net --assume-example --dry-run",
        "absorb-input nets.py:net --mean 0.5 --std 0.5 --dry-run",
    ):
        assert run(*line.split())[0] == 0, line


def test_groups_are_chosen_for_no_method_that_has_none(run) -> None:
    line = "convert nets.py:net --to layer_norm --groups auto --data d.npz"
    status, _, err = run(*line.split())
    assert status == 2 and "layer_norm has no option 'groups'" in err


def test_the_lines_that_they_are_put_in_are_carried_out(folder: Path, run) -> None:
    for command in ("advise", "freeze", "absorb-input", "validate", "recover"):
        out = [] if command in ("advise", "validate") else ["--out", "made", "--force"]
        assert run(command, *LINES[command], *out)[0] == 0, command
    shutil.rmtree(folder / "made")


@pytest.mark.parametrize("words", ["methods", "compare --help"])
def test_a_reader_who_has_seen_enough_ends_a_command_in_silence(words: str) -> None:
    python = shlex.quote(sys.executable)
    line = f"{python} -m normswap {words} | head -1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "141\n" and not done.stderr
