"""The check of an exact rewrite: it passes rounding and nothing else."""

import copy
import math
import time

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.passes.plan import Plan
from normswap.report.converted import Losses
from normswap.report.latency import latencies
from normswap.report.outputs import TOLERANCE, compare_outputs
from normswap.report.rewrite import RewriteReport

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def passes(original: nn.Module, changed: nn.Module, inputs: object = X) -> bool:
    deviation, allowed = compare_outputs(original, changed, inputs)
    report = RewriteReport(model="", plan=Plan(), deviation=deviation, allowed=allowed)
    return report.passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fold_passes_in_every_precision(dtype):
    model, x = network().to(dtype), X.to(dtype)
    assert passes(model, normswap.fold(model, x), x)


def test_one_wrong_channel_does_not_pass():
    model = network()
    folded = normswap.fold(model, X)
    with torch.no_grad():
        folded[0].bias[3] += 1e-2
    assert not passes(model, folded)


def test_the_deviation_is_relative_to_the_largest_output():
    class Scale(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    deviation, allowed = compare_outputs(Scale(2.0), Scale(2.5), X)
    assert deviation == pytest.approx(0.25) and allowed == pytest.approx(TOLERANCE)


class TwoOutputs(nn.Module):
    """A healthy output and then one that may be NaN: neither hides the other."""

    def __init__(self, second: float) -> None:
        super().__init__()
        self.second = second

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x, "b": x * self.second}


def test_nan_in_any_output_does_not_pass():
    deviation, _ = compare_outputs(TwoOutputs(1.0), TwoOutputs(math.nan), X)
    assert math.isnan(deviation)
    assert not passes(TwoOutputs(1.0), TwoOutputs(math.nan))


def test_another_shape_does_not_pass():
    assert not passes(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1))


def test_a_model_that_writes_into_its_input_is_compared_on_the_same():
    model = nn.Sequential(nn.ReLU(inplace=True), *network())
    x = copy.deepcopy(X)
    assert passes(model, normswap.fold(model, x), x)
    assert torch.equal(x, X)


def test_nothing_to_compare_is_no_comparison():
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x[:0]]

    assert compare_outputs(Nothing(), Nothing(), X) is None


def test_a_report_comes_back_from_its_json_as_it_was():
    report = RewriteReport(model="m", plan=Plan(), deviation=math.inf, allowed=1e-5)
    again = RewriteReport.model_validate_json(report.model_dump_json())
    assert again == report and not again.passed


def test_losses_of_a_long_run_are_means_over_hundredths_of_it() -> None:
    losses = Losses()
    for step in range(1, 251):
        losses.add(step, float(step))
    means = losses.means(250)
    assert len(means) == 84
    assert means[0] == (3, 2.0) and means[-1] == (250, 250.0)


def test_a_latency_has_the_quartiles_of_several_runs() -> None:
    (found,) = latencies({"slow": Sleeping()}, torch.zeros(1))
    assert found.runs >= 3
    assert 1.0 <= found.lower <= found.milliseconds <= found.upper


class Sleeping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.001)
        return x


def test_the_last_line_that_is_printed_leads_to_the_page(tmp_path) -> None:
    files = tuple(str(tmp_path / name) for name in ("recipe.json", "report.html"))
    (*_, line) = RewriteReport(model="m", plan=Plan(), files=files).tables()
    assert line.plain == f"report: {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").as_uri() in str(line.style)
