"""The examples run, on any machine, as their first lines say."""

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


def test_example_that_starts_processes_runs_as_its_first_lines_say(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune_frozen.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tune" in done.stdout
