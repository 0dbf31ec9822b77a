"""The examples run, on any machine, as their first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "prints"),
    [
        ("convert_and_calibrate", "calibrated"),
        ("fold_and_deploy", "accuracy in ONNX Runtime, on 500 test images: 99"),
        ("finetune_frozen", "tune"),
        ("recover_without_labels", "recovered     9"),
    ],
)
def test_example_runs_and_prints_its_result(name, prints, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert prints in done.stdout
