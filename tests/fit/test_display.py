"""What is seen of a run where nobody watches: a few lines, from the first process alone."""

import time

import pytest
from learners import batches, net

import normswap as ns
from normswap.fit.training import Display


@pytest.mark.parametrize("steps", [1, 7, 10, 19, 25, 1000])
def test_a_log_has_at_most_ten_lines_and_the_last_step(
    steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with Display("training", steps, 0, quiet=False) as display:
        for step in range(1, steps + 1):
            display.show(step, 1.0 / step, 0.5, 0.1)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 1 <= len(lines) <= 11
    assert lines[-1].startswith(f"training: {steps}/{steps} loss ")
    assert lines[-1].endswith("accuracy 50.0%, rate 0.1")


def test_a_log_says_how_much_time_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("training", 10, 0, quiet=False) as display:
        for step in range(1, 5):
            time.sleep(0.02)
            display.show(step, 1.0, 0.5, 0.1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "training accuracy 50.0%" in last and last.endswith(", 0:00:01 left")


def test_other_processes_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("training", 2, 0, quiet=True) as display:
        display.show(1, 1.0, None, 0.1)
    assert capsys.readouterr() == ("", "")


def test_accuracy_is_shown_where_there_are_labels(capsys: pytest.CaptureFixture[str]) -> None:
    ns.finetune(net(), batches(), steps=2)
    assert "accuracy" in capsys.readouterr().err
    unlabelled = [x for x, _ in batches()]
    ns.finetune(net(), unlabelled, steps=2, loss=lambda output, batch: output.square().mean())
    said = capsys.readouterr().err
    assert "loss" in said and "accuracy" not in said
