"""The command line: what it prints, what it writes, and how it fails."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from children import finished, forked
from safetensors.torch import save_file

import normswap
from normswap.demo.digits import RECORD, digits, digits_data
from normswap.graph.snapshot import evaluating
from normswap.passes.recipe import recipe_of
from normswap.source.factory import call_factory
from normswap.store import resolve

CODE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(2, 3, 8, 8)

def no_inputs():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(6))

def no_batch_norm():
    return nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean * 1.5, self.var)  # no module holds it

def functional():
    return Functional(), torch.randn(2, 3, 8, 8)

# A batch norm called as a function, and one that is a module.
class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.gain, self.offset = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv(x)
        x = nn.functional.batch_norm(x, self.mean, self.var, self.gain, self.offset, self.training)
        return self.bn(self.last(x.relu()))

def called():
    return Called().eval(), torch.randn(4, 3, 8, 8)

def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.zeros(4).long())] * 2

def unlabelled():
    return [torch.randn(4, 3, 8, 8)] * 2

# The first LayerNorm takes the input as it comes, the second what a Linear makes.
class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a = nn.LayerNorm(8), nn.Linear(8, 8)
        self.second, self.b = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.second(self.a(self.first(x))))

def layer_norms():
    return Centered(), torch.randn(2, 5, 8)

def redundant():
    torch.manual_seed(0)
    first, last = nn.RMSNorm(8, eps=1e-4), nn.RMSNorm(4, eps=1e-4)
    return nn.Sequential(first, nn.Linear(8, 4, bias=False), last), torch.randn(2, 5, 8)

# What the BatchNorm normalizes is used as well without it.
class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)
        self.bn.running_mean.normal_()

    def forward(self, x):
        x = self.conv(x)
        return self.bn(x).relu() * x.sigmoid()

def shared():
    return Shared(), torch.randn(2, 3, 8, 8)

def scripted():
    return torch.jit.script(net()[0])

def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())

def quantized():
    import warnings
    warnings.simplefilter("ignore")  # torch deprecates its own quantization
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))

def nan_mean():
    model, x = net()
    model[1].running_mean[2] = float("nan")
    return model, x

def negative_variance():
    model, x = net()
    model[1].running_var[2] = -1
    return model, x
"""


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """In a folder with networks, on a terminal of 200 columns."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "nets.py").write_text(CODE)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    return run


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


class RunsCode:
    def __reduce__(self):
        return (Path("ran").touch, ())


def write_inputs(folder: Path) -> None:
    """The bad files that the cases below name."""
    (folder / "corrupt.safetensors").write_bytes(b"not safetensors at all")
    save_file({"other.weight": torch.zeros(2)}, folder / "other.safetensors")
    (folder / "hostile.pth").write_bytes(pickle.dumps(RunsCode()))
    torch.save({"state_dict": RunsCode()}, folder / "hostile.pt")
    (folder / "empty").mkdir()
    (folder / "empty" / "readme.txt").write_text("no image")
    for name in ("a", "b"):
        (folder / "broken" / name).mkdir(parents=True)
        (folder / "broken" / name / "image.png").write_bytes(b"no image")
    (folder / "file").write_text("in the way")
    np.savez(folder / "wrong.npz", images=np.zeros((2, 3)))
    np.savez(folder / "twelve.npz", x=np.zeros((40, 1, 8, 8)), y=np.arange(40) % 12)


BAD = {
    "unknown method": ("convert nets.py:net --to grup_norm", "did you mean 'group_norm'"),
    "unknown option": (
        "convert nets.py:net --to group_norm --set colour=red",
        "no option 'colour'",
    ),
    "an option twice": ("convert nets.py:net --to group_norm --groups 2 --set groups=4", "twice"),
    "impossible value": (
        "convert nets.py:net --to batch_renorm --set r_max=0 --dry-run",
        "r_max >= 1",
    ),
    "value of another type": (
        "convert nets.py:net --to batch_renorm --set schedule=abc --dry-run",
        "a valid boolean",
    ),
    "groups that do not divide": ("convert nets.py:net --to group_norm --groups 3", "1, 2, 4, 8"),
    "groups that are no number": ("convert nets.py:net --to group_norm --groups x", "a number"),
    "unknown source": ("inspect nonsense", "unknown model"),
    "misspelt scheme": ("inspect demmo:digits", "did you mean demo:NAME?"),
    "unknown name": ("inspect torchvision:resnet19", "resnet18"),
    "no such file": ("inspect missing.py:net", "missing.py"),
    "missing checkpoint": ("inspect nets.py:net --checkpoint none.pth", "none.pth"),
    "corrupt checkpoint": ("inspect nets.py:net --checkpoint corrupt.safetensors", "corrupt"),
    "other keys": ("inspect nets.py:net --checkpoint other.safetensors", "other.weight"),
    "pickle with code": ("inspect nets.py:net --checkpoint hostile.pth", "hostile.pth"),
    "torch pickle with code": ("inspect nets.py:net --checkpoint hostile.pt", "hostile.pt"),
    "wrong channels": ("fold nets.py:net --input 1x4x8x8", "does not run on an input of 1x4x8x8"),
    "channels last": ("fold nets.py:net --input 2x8x8x3", "PyTorch takes 2x3x8x8: permute"),
    "no such device": ("fold nets.py:net --device nope", "cannot use --device nope"),
    "no whole number": (
        "recover x --teacher x --data x --steps 1.5",
        "'1.5' is not a whole number",
    ),
    "a folder and no file": ("fold nets.py:net --out net.onnx", "must name a folder here"),
    "no shape": ("fold nets.py:net --input 1,3,8,8", "write 1x3x224x224"),
    "unwritable folder": ("fold nets.py:net --out file/below", "cannot write to"),
    "no images": ("convert nets.py:net --to group_norm --data empty", "no images"),
    "wrong arrays": ("convert nets.py:net --to group_norm --data wrong.npz", "wrong.npz"),
    "broken image": ("convert nets.py:net --to group_norm --test broken", "cannot read the image"),
    "no data": ("convert nets.py:net --to group_norm --data nowhere", "nowhere"),
    "nan statistics": ("fold nets.py:nan_mean", "running mean of 1 holds NaN"),
    "negative variance": ("freeze nets.py:negative_variance", "running variance of 1 is negative"),
    "scripted": ("fold nets.py:scripted", "scripted"),
    "lazy": ("convert nets.py:lazy --to group_norm", "run one batch"),
    "quantized": ("fold nets.py:quantized", "quantized"),
    "no batch norm": ("fold nets.py:no_batch_norm", "nothing to change"),
    "nothing to replace": ("convert nets.py:functional --to group_norm", "nothing was replaced"),
    "glob without match": ("fold nets.py:net --include 'block*'", "matches none"),
    "unknown command": ("xyz", "no such command 'xyz'; see normswap --help"),
    "misspelt command": ("flod", "no such command 'flod' (did you mean 'fold'?); see"),
    "missing option": ("convert nets.py:net", "--to"),
    "unknown opset": ("export nets.py:net --opset 99", "opset 99"),
    "not onnx": ("validate file nets.py:net", "file"),
    "unknown mode": ("freeze nets.py:net --mode deep", "'eval' or 'tune'"),
    "no layer norm": ("center nets.py:net", "1 BatchNorm2d and no layer normalization"),
    "no gain to fold": ("fold-gains nets.py:net", "1 BatchNorm2d and no layer, rms"),
    "no matrix of that name": ("rotate nets.py:layer_norms --matrix fourier", "'fourier'"),
    "components of nothing": ("rotate nets.py:layer_norms --matrix pca", "--data"),
    "data of no use": ("rotate nets.py:layer_norms --data nets.py:batches", "--matrix pca"),
    "no such limit": ("rescale nets.py:net --data nets.py:batches --limit int8", "--limit"),
    "center without a match": ("center nets.py:layer_norms --include third", "matches none"),
    "center without inputs": ("center nets.py:no_inputs --onnx", "--input"),
    "channels of the mean": (
        "absorb-input nets.py:net --mean 0.5,0.5 --std 1,1",
        "2 channels",
    ),
    "a std of 0": ("absorb-input nets.py:net --mean 0,0,0 --std 1,0,1", "std"),
    "raw input without inputs": ("absorb-input nets.py:no_inputs", "--input"),
    "no labels": ("finetune nets.py:net --data nets.py:unlabelled --out out", "no labels"),
    "other classes": (
        "finetune demo:digits --data twelve.npz --out out",
        "to 11, but the model has 10",
    ),
    "no checkpoint": ("finetune demo:digits --data demo:digits --resume", "no checkpoint in"),
    "precision": ("finetune demo:digits --data demo:digits --precision fp8", "use float32, bfloat"),
    "statistics": ("finetune demo:digits --data demo:digits --statistics x", "eval or tune or"),
    "a rate of 0": ("finetune demo:digits --data demo:digits --lr 0", "lr 0 must be above 0"),
    "crop of other data": ("finetune nets.py:net --data nets.py:batches --crop 2", "own loader"),
    "nothing to recover": (
        "recover demo:digits --teacher demo:digits --data demo:digits --out out",
        "same normalization layers",
    ),
    "groups of what has none": ("convert nets.py:net --to layer_norm --groups 2", "no option"),
    "bad mean": ("compare nets.py:net nets.py:net --data x --mean red", "--mean takes numbers"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_changes_nothing(arguments, says, run):
    write_inputs(Path())
    before = files_below(Path())
    status, out, err = run(*arguments.replace("'", "").split())
    assert status == 2
    assert says in err
    assert out == "" and err.startswith("normswap: ") and err.count("\n") == 1
    assert "unexpected error" not in err
    assert files_below(Path()) == before  # so nothing was written, and no pickle ran


def test_debug_shows_the_traceback(run):
    status, _, err = run("inspect", "nonsense", "--debug")
    assert status == 2 and "Traceback" in err


def test_inspect_prints_sites_and_summary(run):
    status, out, _ = run("inspect", "demo:digits")
    assert status == 0
    assert "residual.shortcut.1" in out and "into residual.shortcut.0" in out
    assert "8 normalizations: 8 batch" in out and "can be folded: 8 of 8" in out
    status, out, _ = run("inspect", "demo:digits", "--json")
    report = json.loads(out)
    assert report["summary"]["by_kind"] == {"batch": 8}
    assert {site["name"]: site["fold"] for site in report["sites"]}["neck.1"] == "neck.0"


def test_a_dry_run_prints_the_plan_and_writes_nothing(run):
    before = files_below(Path())
    status, out, _ = run("convert", "nets.py:net", "--to", "group_norm", "--dry-run")
    assert status == 0 and "group_norm(groups=4)" in out
    assert files_below(Path()) == before
    status, out, _ = run("fold", "nets.py:net", "--dry-run", "--json")
    assert status == 0 and normswap.Plan.from_json(out).changed == ("1",)
    assert files_below(Path()) == before


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[int, str, Path]:
    """The main job, as `make demo` runs it: its status, what it prints, and what it writes."""
    folder = tmp_path_factory.mktemp("demo")
    command = "convert demo:digits --to group_norm --data demo:digits --onnx --out out"
    status = finished(forked(folder, command.split()))
    return status, (folder / "stdout").read_text(), folder / "out"


def test_the_main_job_prints_what_it_did(demo):
    status, printed, _ = demo
    assert status == 0
    for word in ("original", "plain swap", "calibrated", "sites changed", "ONNX", "deviation"):
        assert word in printed


def test_the_main_job_keeps_the_accuracy(demo):
    report = json.loads((demo[2] / "report.json").read_text())
    accuracy = report["accuracy"]
    assert accuracy["original"] == pytest.approx(json.loads(RECORD.read_text())["test_accuracy"])
    assert accuracy["calibrated"] >= accuracy["original"] - 0.02
    assert accuracy["calibrated"] > accuracy["plain swap"]


def test_what_the_main_job_wrote_agrees_with_itself(demo):
    """The folder loads as a model with no BatchNorm, and the ONNX file computes the same."""
    model = normswap.load(demo[2]).eval()
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    x, labels = digits_data("test")
    session = onnxruntime.InferenceSession(
        demo[2] / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-3, atol=1e-4)
    reported = json.loads((demo[2] / "report.json").read_text())["accuracy"]["calibrated"]
    assert (logits.argmax(1) == labels.numpy()).mean() == pytest.approx(reported, abs=1e-3)


def test_fold_export_and_validate_follow_each_other(run):
    assert run("fold", "demo:digits", "--out", "folded")[0] == 0
    assert run("export", "folded", "--out", "shipped")[0] == 0
    status, out, _ = run("validate", "shipped/model.onnx", "folded")
    assert status == 0 and "passed" in out
    # The folded file computes what the unfolded model does, and another model is found out.
    assert run("validate", "shipped/model.onnx", "demo:digits")[0] == 0
    assert run("convert", "demo:digits", "--to", "identity", "--out", "other")[0] == 0
    status, out, _ = run("validate", "shipped/model.onnx", "other")
    assert status == 1 and "first divergence: stem.0.0" in out


def test_freeze_bake_and_calibrate_write_folders_that_load(run):
    x = digits_data("test")[0][:4]
    with torch.no_grad():
        expected = digits()(x)
        assert run("freeze", "demo:digits", "--mode", "tune", "--out", "tuned")[0] == 0
        torch.testing.assert_close(normswap.load("tuned")(x), expected, rtol=1e-4, atol=1e-4)
        assert run("bake", "tuned", "--out", "baked")[0] == 0
        torch.testing.assert_close(normswap.load("baked")(x), expected, rtol=1e-4, atol=1e-4)
    assert run("convert", "demo:digits", "--to", "layer_norm", "--out", "swapped")[0] == 0
    calibrate = "calibrate swapped --teacher demo:digits --data demo:digits --out calibrated --json"
    status, out, _ = run(*calibrate.split())
    accuracy = json.loads(out)["accuracy"]
    assert status == 0 and accuracy["calibrated"] > accuracy["before"]


def in_eval(reference: str, source: str | None = None) -> torch.Tensor:
    """The output of a model on the example input of its source."""
    opened = resolve(reference, source=source)
    with evaluating(opened.model), torch.no_grad():
        return opened.model(resolve(source or reference).inputs)


REWRITES = {
    "center": ("center nets.py:layer_norms", {"second": "RMSNorm", "first": "LayerNorm"}),
    "fold-gains": ("fold-gains nets.py:layer_norms", {"second": "LayerNorm", "first": "LayerNorm"}),
    "rotate": ("rotate nets.py:layer_norms", {"second": "LayerNorm", "first": "LayerNorm"}),
    "rescale": ("rescale nets.py:net --data nets.py:batches --limit 0.01", {"1": "BatchNorm2d"}),
    "center, trainable": ("center nets.py:layer_norms --trainable", {"second": "RMSNorm"}),
    "no copy": ("fold nets.py:shared", {"bn": "ChannelAffine"}),
    "a copy": ("fold nets.py:shared --duplicate", {"bn": "Conv2d"}),
    "functional": ("fold nets.py:called", {"batch_norm": "Identity", "bn": "Identity"}),
}


@pytest.mark.parametrize(("arguments", "makes"), REWRITES.values(), ids=REWRITES.keys())
def test_an_exact_rewrite_writes_a_model_that_computes_the_same(arguments, makes, run):
    status, out, err = run(*arguments.split(), "--onnx", "--out", "out")
    assert (status, err) == (0, "") and "deviation" in out
    source = arguments.split()[1]
    model = normswap.load("out", source=source)
    assert {name: type(model.get_submodule(name)).__name__ for name in makes} == makes
    torch.testing.assert_close(in_eval("out", source), in_eval(source), rtol=1e-4, atol=1e-5)


def test_a_redundant_norm_is_removed_on_request_and_moves_what_was_measured(run):
    command = "fold-gains nets.py:redundant --out out"
    assert run(*command.split())[0] == 0
    assert type(normswap.load("out", source="nets.py:redundant")[0]).__name__ == "RMSNorm"
    status, out, err = run(*command.split(), "--remove-redundant", "--onnx", "--force")
    assert (status, err) == (0, "") and "normalized again by 2" in out
    assert type(normswap.load("out", source="nets.py:redundant")[0]).__name__ == "Identity"
    report = json.loads(Path("out/report.json").read_text())
    (edit,) = (edit for edit in report["plan"]["edits"] if edit["edit"] == "reduce")
    assert 1e-5 < report["deviation"] <= report["allowed"] == 1e-5 + edit["deviation"]


def test_fold_for_a_cpu_writes_that_layout(run):
    assert run("fold", "nets.py:net", "--channels-last", "--out", "out")[0] == 0
    (weight, _) = normswap.load("out", source="nets.py:net").parameters()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    expected = in_eval("nets.py:net")
    torch.testing.assert_close(in_eval("out", "nets.py:net"), expected, rtol=1e-4, atol=1e-5)


def test_absorb_input_writes_a_model_of_raw_pixels(run):
    command = "absorb-input nets.py:net --mean 0.5,0.4,0.3 --std 0.2,0.25,0.3 --onnx --out out"
    status, out, err = run(*command.split())
    assert (status, err) == (0, "") and "deviation" in out
    raw = normswap.load("out", source="nets.py:net").eval()
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]]).view(2, 3, 1, 1)
    with torch.no_grad():
        expected = resolve("nets.py:net").model.eval()((pixels / 255 - mean) / std)
        torch.testing.assert_close(raw(pixels), expected, rtol=1e-4, atol=1e-5)
    before = files_below(Path())
    status, out, _ = run(*command.split(), "--dry-run")
    assert status == 0 and "move into 0" in out
    assert files_below(Path()) == before


@pytest.mark.parametrize(
    ("source", "method"),
    [
        *(("nets.py:called", method) for method in ("group_norm", "layer_norm", "batch_norm")),
        ("program.pt2", "group_norm"),
    ],
)
def test_convert_with_data_is_that_of_python_where_functions_normalize(source, method, run):
    opened = resolve("nets.py:called")
    torch.export.save(torch.export.export(opened.model, (opened.inputs,)), "program.pt2")
    data = call_factory("nets.py:batches")
    expected = normswap.convert(resolve(source).model, method, data=data)
    command = f"convert {source} --to {method} --data nets.py:batches"
    status, out, _ = run(*command.split(), "--dry-run", "--json")
    assert status == 0 and normswap.Plan.from_json(out).edits == recipe_of(expected).edits
    status, out, _ = run(*command.split(), "--out", "out", "--json")
    assert status == 0
    written = normswap.load("out", source=source)
    assert recipe_of(written).edits == recipe_of(expected).edits
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(written.state_dict()[name], tensor, rtol=0, atol=0)


def test_code_of_a_saved_folder_runs_only_when_named(run):
    assert run("fold", "nets.py:net", "--out", "folded")[0] == 0
    status, _, err = run("inspect", "folded")
    assert status == 2 and "--source nets.py:net" in err
    assert run("inspect", "folded", "--source", "nets.py:net")[0] == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("disk full")])
def test_an_interrupted_run_leaves_the_previous_files(stop, run, monkeypatch):
    assert run("fold", "nets.py:net", "--out", "out")[0] == 0
    before = files_below(Path())

    def interrupted(*args, **kwargs):
        raise stop

    monkeypatch.setattr("normswap.report.rewrite.export", interrupted)
    status, *_ = run("fold", "nets.py:net", "--onnx", "--out", "out", "--force")
    assert status == (130 if stop is KeyboardInterrupt else 2)
    assert files_below(Path()) == before
    assert not list(Path().rglob(".normswap-*"))


def test_ctrl_c_ends_with_130_and_leaves_the_previous_files(run):
    """A real SIGINT, while the calibration runs."""
    assert run("fold", "nets.py:net", "--out", "out")[0] == 0
    before = files_below(Path())
    Path("slow.py").write_text(
        "import pathlib, time, torch\n"
        "class Slow:\n"
        "    def __iter__(self):\n"
        "        while True:\n"
        "            pathlib.Path('reading').touch()\n"
        "            time.sleep(0.05)\n"
        "            yield torch.zeros(2, 3, 8, 8)\n"
    )
    command = "convert nets.py:net --to group_norm --data slow.py:Slow --samples 1000000"
    command += " --out out --force"
    running = forked(Path(), command.split())
    deadline = time.monotonic() + 60
    while not Path("reading").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(running, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(running, 0)[1]) == 130
    assert Path("stderr").read_text().splitlines()[-1].startswith("normswap: interrupted")
    for name in ("reading", "slow.py", "stdout", "stderr"):
        Path(name).unlink()
    assert files_below(Path()) == before


def test_methods_lists_every_method(run):
    status, out, _ = run("methods", "--json")
    assert status == 0 and json.loads(out).keys() == normswap.methods().keys()


def test_help_imports_neither_torch_nor_onnx_and_answers_at_once():
    code = (
        "import sys, time\n"
        "sys.argv = ['normswap', '--help']\n"
        "from normswap.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & sys.modules.keys()\n"
        "print(time.process_time(), file=sys.stderr)\n"
    )
    taken = []
    for _ in range(4):  # the least of them: what else the machine does makes the others longer
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "convert" in done.stdout
        taken.append(float(done.stderr))
    assert min(taken) <= 0.5, taken


def test_an_onnx_file_of_other_weights_does_not_stay(run):
    assert run("convert", "demo:digits", "--to", "group_norm", "--onnx", "--out", "out")[0] == 0
    Path("out/model.onnx.data").write_text("weights beside it")
    Path("out/notes.txt").write_text("the user's")
    assert Path("out/model.onnx").exists()
    assert run("convert", "demo:digits", "--to", "layer_norm", "--out", "out", "--force")[0] == 0
    names = {file.name for file in Path("out").iterdir()}
    assert not names & {"model.onnx", "model.onnx.data"}
    assert {"model.safetensors", "notes.txt"} <= names


def test_a_name_that_no_file_can_have_is_told_in_one_line(run):
    status, _, told = run("validate", "a" * 300 + ".onnx", "demo:digits")
    assert status == 2
    assert told.count("\n") == 1
    assert "File name too long; name another" in told


def test_a_target_that_is_none_is_told_before_the_work(run):
    command = "convert demo:digits --to group_norm --onnx --target phone"
    status, _, told = run(*command.split())
    assert status == 2
    assert "no target 'phone'; choose one of generic, onnxruntime" in told
    assert not Path("normswap-out").exists()
