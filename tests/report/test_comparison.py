"""Two models side by side, one of them an ONNX file or not, in Python and on the command line."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap.core.errors import NormswapError
from normswap.report.latency import latencies
from normswap.report.measurements import size_of
from normswap.report.onnx_model import OnnxModel

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    )
    return model.eval(), torch.randn(2, 3, 8, 8)
"""


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`network()` as ONNX, of any batch size and of batch size 4."""
    folder = tmp_path_factory.mktemp("onnx")
    for name, dynamic in (("any", True), ("four", False)):
        normswap.export(network(), X[:4], folder / name, dynamic=dynamic, validate=False)
    return {name: folder / name for name in ("any", "four")}


def test_accuracy_and_agreement_are_those_counted_by_hand():
    one, other = network(0), network(1)
    report = normswap.compare(one, other, data=[(X[:4], LABELS[:4]), (X[4:], LABELS[4:])])
    with torch.no_grad():
        a, b = (model.eval()(X).argmax(1) for model in (one, other))
    assert report.agreement == pytest.approx((a == b).double().mean().item())
    assert report.accuracy == {
        name: pytest.approx((chosen == LABELS).double().mean().item())
        for name, chosen in (("A", a), ("B", b))
    }


def test_the_normalizations_of_both_stand_side_by_side():
    one = network()
    swapped = normswap.convert(one, "group_norm", groups=2)
    report = normswap.compare(one, swapped, X)
    assert [(n.site, n.a, n.b) for n in report.norms] == [("1", "BatchNorm2d", "GroupNorm")]
    assert [each.site for each in report.measurements.sites] == ["1", ""]
    assert report.deviation > 1e-3 and report.agreement is None and report.accuracy == {}


@pytest.mark.parametrize("name", ["any", "four"])
def test_an_onnx_file_is_compared_as_a_module_is(name, files):
    report = normswap.compare(network(), files[name], data=[(X, LABELS)])
    assert report.deviation < 1e-5 and report.agreement == 1
    assert report.accuracy["A"] == report.accuracy["B"]
    (output,) = report.measurements.sites
    assert output.snr_db > 100
    runtimes = [each.runtime for each in report.measurements.latency]
    assert runtimes == ["torch, eager", "ONNX Runtime"]


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_a_file_of_a_fixed_batch_size_takes_any_number_of_samples(samples, files):
    expected = network().eval()(X[:samples])
    actual = OnnxModel(files["four"])(X[:samples].double())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_takes_other_inputs_says_so_in_one_line(files):
    file = OnnxModel(files["any"])
    for given in ((X, X), (X[:, :2],)):
        with pytest.raises(NormswapError) as refused:
            file(*given)
        assert "\n" not in str(refused.value)


def test_a_size_counts_every_tensor_once(files):
    model = network()
    model.again = model[4]
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    assert size_of("", model).bytes == sum(t.nbytes for t in tensors.values())
    assert size_of("", model).parameters == 3 * 8 * 9 + 8 + 16 + 288 * 3 + 3
    assert size_of("", OnnxModel(files["any"])).bytes == files["any"].stat().st_size


def test_models_take_turns_and_are_as_before():
    calls = []

    class Called(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append((self.name, self.training))
            return x.add_(1)

    models, x = {name: Called(name) for name in "ab"}, copy.deepcopy(X)
    found = latencies(models, x)
    assert [each.runs for each in found] == [15, 15] and all(m.training for m in models.values())
    assert calls == [("a", False), ("b", False)] * 16
    assert torch.equal(x, X)


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Run a line in a folder with a network and data."""
    (tmp_path / "nets.py").write_text(CODE)
    np.savez(tmp_path / "data.npz", x=X.repeat(4, 1, 1, 1), y=LABELS.repeat(4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda line: run(*line.split())


def test_convert_recover_export_and_compare_write_a_page(run):
    lines = {
        "swapped": "convert nets.py:net --to layer_norm --data data.npz",
        "recovered": "recover swapped --source nets.py:net --teacher nets.py:net --data data.npz "
        "--steps 2",
        "shipped": "export recovered --source nets.py:net",
        "compared": "compare nets.py:net shipped/model.onnx --data data.npz",
    }
    for folder, line in lines.items():
        status, _, err = run(f"{line} --out {folder}")
        assert status == 0, err
        report = json.loads((Path(folder) / "report.json").read_text())
        assert report["command"] == f"normswap {line} --out {folder}"
        times = [each["milliseconds"] for each in report["measurements"]["latency"]]
        assert len(times) == 2 and min(times) > 0
        assert (Path(folder) / "report.html").read_text().startswith("<!DOCTYPE html>")
    for folder in ("swapped", "recovered"):
        report = json.loads((Path(folder) / "report.json").read_text())
        assert [site["site"] for site in report["measurements"]["sites"]] == ["1", ""]
        assert report["recipe"]["passes"] == ["Replace(layer_norm)"]


def test_models_that_differ_are_no_error(run):
    status, out, err = run("compare nets.py:net nets.py:net --input 2x3x8x8 --out same --json")
    assert (status, err) == (0, "")
    assert json.loads(out)["measurements"]["sites"][-1]["snr_db"] == "Infinity"
    assert run("convert nets.py:net --to instance_norm --out other")[0] == 0
    status, out, _ = run("compare nets.py:net other --source-b nets.py:net --out differ")
    assert status == 0 and "deviation" in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("compare nets.py:net missing.onnx", "there is no ONNX file"),
        ("compare nets.py:net nets.py", "nets.py"),
        ("compare bad.onnx nets.py:net", "not an ONNX model"),
        ("compare bad.onnx nets.py:net --checkpoint x.pt", "its own weights"),
        ("compare nets.py:net nets.py:net --input 2x4x8x8", "does not run"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(line, says, run):
    Path("bad.onnx").write_bytes(b"no")
    before = sorted(Path().rglob("*"))
    status, out, err = run(line)
    assert status == 2 and says in err and err.count("\n") == 1 and out == ""
    assert "unexpected error" not in err
    assert [p for p in sorted(Path().rglob("*")) if "__pycache__" not in p.parts] == before
