"""The examples run, on any machine, as their first lines say."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import normswap

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "prints"),
    [
        ("convert_and_calibrate", "calibrated"),
        ("fold_and_deploy", "accuracy in ONNX Runtime, on 500 test images: 99"),
        ("recover_without_labels", "recovered     9"),
        ("federated", "frozen BatchNorm                 99"),
        ("segmentation", "recovered   7"),
    ],
)
def test_example_runs_and_prints_its_result(name, prints, tmp_path, monkeypatch, capsys):
    recover = normswap.recover
    monkeypatch.setattr(normswap, "recover", lambda *given, steps: recover(*given, steps=60))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert prints in capsys.readouterr().out


def test_example_in_private_learns_from_the_right_start_and_needs_opacus(monkeypatch, capsys):
    pytest.importorskip("opacus")
    script = str(EXAMPLES / "private_finetune.py")
    runpy.run_path(script, run_name="__main__")
    after = [float(line.split()[-3].rstrip("%,")) for line in capsys.readouterr().out.splitlines()]
    assert after[0] < 50 < 95 < min(after[1:])  # the fix of Opacus, the swap, the fold
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(SystemExit, match=r"needs Opacus; run: pip install opacus"):
        runpy.run_path(script)


def test_example_trains_a_detector_with_one_image_and_folds_it(capsys):
    pytest.importorskip("torchvision")
    runpy.run_path(str(EXAMPLES / "detection.py"), run_name="__main__")
    first, *steps, last = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert first == "BatchNorms: 70" and last.startswith("BatchNorms after the fold: 0")
    assert losses[-1] < losses[0] and float(last.split()[-1]) < 1e-5


def test_example_rotates_a_language_model_for_four_bits(capsys):
    pytest.importorskip("transformers")
    runpy.run_path(str(EXAMPLES / "language_model.py"), run_name="__main__")
    *_, folded, rotated = [float(x) for x in re.findall(r"([\d.]+)%", capsys.readouterr().out)]
    assert rotated < 0.7 * folded


@pytest.mark.parametrize("name", ["swap_and_recover", "fold_and_export"])
def test_notebook_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    namespace = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), namespace)
    assert "99" in capsys.readouterr().out.splitlines()[-1]


def test_example_that_starts_processes_runs_as_its_first_lines_say(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune_frozen.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tune" in done.stdout
