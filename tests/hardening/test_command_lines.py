"""Absurd values on the command line: each is refused in one line, and nothing on the disk changes."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import typer

from normswap import cli
from normswap.cli.app import app
from normswap.errors import NormswapError
from normswap.shown import shown
from normswap.source import parse_input

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
        *("1x1x99999999x99999999", "1x0x4x4", "1x" * 300 + "1", "int64:1x1x4x4", "1x1x5x5"),
    ],
    "include": ["nonsense", "[", "\x1b[31m", LONG],
    "exclude": ["nonsense", "[", "\x1b[31m", LONG],
    "groups": ["", "x", "-1", "0", "1.5", "1e30", "9" * 5000, "3"],
    "device": ["", "meta", "nonsense", "cuda:99", "cuda:-1", "-1", "0,1", "\x1b[31m", LONG],
    "set": [
        *("", "=", "a", "=1", "__class__=1", "num_features=3", "nonsense=1", "eps", "eps=", "eps=x"),
        *("eps=nan", "eps=NaN", "eps=Infinity", "eps=1e400", "eps=-1", "eps=[]", "eps={}"),
        *('eps={"a":{"b":[1]}}', "eps=[[[1]]]", f"eps={'[' * 5000}", f"eps={'9' * 5000}"),
        *("eps=true", 'eps="\\u001b[31m"', "eps=\ud800", "eps=null"),
    ],
}
# What a command may well do, of those above.
MEANT = {("seed", "-1")}


def options(command: str) -> Iterator[tuple[str, str | None, list[str]]]:
    """The name, the flag (None of an argument) and absurd values of what `command` takes."""
    (callback,) = [
        each.callback
        for each in app.registered_commands
        if each.callback is not None and each.callback.__name__.replace("_", "-") == command
    ]
    for name, hint in get_type_hints(callback, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        inner, said = get_args(hint)
        kinds = {inner, *get_args(inner)}
        for kind in (int, float, str, Path):
            if kind in kinds or list[kind] in kinds:  # type: ignore[valid-type]
                flag = f"--{name.replace('_', '-')}"
                is_option = not isinstance(said, typer.models.ArgumentInfo)
                yield name, flag if is_option else None, BY_NAME.get(name) or BY_TYPE[kind]


def absurd(command: str) -> Iterator[list[str]]:
    """Command lines with one absurd value each."""
    line, place = LINES[command], 0
    for name, flag, values in options(command):
        for value in values:
            if (name, value) in MEANT:
                continue
            if flag is None:
                yield [command, *line[:place], "--", *line[place:]] if False else [
                    command,
                    *line[len(arguments(command)) :],
                    "--",
                    *line[:place],
                    value,
                    *line[place + 1 : len(arguments(command))],
                ]
            else:
                kept = list(line)
                if flag in kept:
                    del kept[kept.index(flag) : kept.index(flag) + 2]
                yield [command, *kept, f"{flag}={value}"]
        place += flag is None


def arguments(command: str) -> list[str]:
    return [name for name, flag, _ in options(command) if flag is None]
