"""A package of somebody else adds a method: installed is all it has to be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

# A whole third-party package: one file with a module and its Method.
CODE = '''
"""Scale each channel by the largest magnitude it had."""

import torch
from torch import nn

from normswap.norms.registry import Method


class MaxNorm(nn.Module):
    norm_kind = "max"

    def __init__(self, num_features, *, eps=1e-5, affine=True, power=1.0):
        super().__init__()
        self.num_features, self.eps, self.power = num_features, eps, power
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None

    def forward(self, x):
        largest = x.flatten(1).abs().amax(1).view(-1, *[1] * (x.dim() - 1))
        y = x / (largest + self.eps) ** self.power
        if self.weight is None:
            return y
        shape = (-1, *[1] * (x.dim() - 2))
        return y * self.weight.view(shape) + self.bias.view(shape)


method = Method(
    "max_norm",
    MaxNorm,
    summary="per sample, by the largest magnitude",
    source="nobody",
    formula="gamma x / max|x| + beta",
    cost="2 passes",
)
'''
METADATA = "Metadata-Version: 2.1\nName: normswap-max\nVersion: 1.0\n"


# Carries out one command after the other in this process, and prints how each ended.
RUN = """
import contextlib, io, json, sys
from normswap.cli import main
ended = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["normswap", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as end:
            ended.append((end.code, out.getvalue()))
print(json.dumps(ended))
"""
COMMANDS = (
    "methods --json",
    "methods --invariances --json",
    "convert demo:digits --to max_norm --set power=0.5 --data demo:digits --samples 200 --onnx "
    "--out out --json",
    "inspect out",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What the commands print in a process that has the package as pip would have laid it down.

    And the folder that they ran in.
    """
    folder = tmp_path_factory.mktemp("installed")
    site = folder / "site"
    info = site / "normswap_max-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "normswap_max.py").write_text(CODE)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text("[normswap.methods]\nmax_norm = normswap_max:method\n")
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([each.split() for each in COMMANDS])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert [status for status, _ in ended] == [0] * len(COMMANDS), done.stderr
    return folder, [out for _, out in ended]


def test_an_installed_method_is_listed_with_its_facts(installed) -> None:
    facts = json.loads(installed[1][0])["max_norm"]
    assert facts["summary"] == "per sample, by the largest magnitude"
    assert facts["options"] == ["power"] and facts["batch_independent"]


def test_its_invariances_are_computed(installed) -> None:
    stays = json.loads(installed[1][1])["max_norm"]
    assert [name for name, yes in stays.items() if yes] == [
        "weight matrix re-scaling",
        "dataset re-scaling",
        "single training case re-scaling",
    ]


def test_a_model_is_converted_to_it_calibrated_and_exported(installed) -> None:
    folder, printed = installed
    report = json.loads(printed[2])
    assert report["export"]["passed"] and report["export"]["dynamic"]
    assert report["accuracy"]["calibrated"] > 0.9 > report["accuracy"]["plain swap"]
    session = onnxruntime.InferenceSession(str(folder / "out" / "model.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((3, 1, 8, 8), "float32")})
    assert logits.shape == (3, 10) and np.isfinite(logits).all()
    assert "max" in printed[3]  # the folder can be opened


def test_uninstalled_it_is_unknown(run) -> None:
    status, _, told = run("convert", "demo:digits", "--to", "max_norm")
    assert status == 2 and "unknown method 'max_norm'" in told
