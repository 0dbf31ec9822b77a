"""A wrong input is told in one line, and no figure stands for what it is not.

Weights that are random, labels of other classes, data that were trained on, results that would be
replaced.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap.demo.digits import digits, digits_data

Run = Callable[..., tuple[int, str, str]]
NETS = """
import torch
from torch import nn

def net(classes=10):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, classes)).eval(), torch.ones(2, 3, 8, 8)

def four():
    return net(4)

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return nn.functional.batch_norm(self.conv(x), self.mean, self.var)

def functional():
    return Functional().eval(), torch.ones(2, 3, 8, 8)

def no_inputs():
    return net()[0]
"""


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "nets.py").write_text(NETS)
    return lambda line: run(*line.split())


def refused(ran: tuple[int, str, str], *says: str) -> None:
    status, out, err = ran
    assert status == 2 and out == "" and err.count("\n") == 1, err
    assert all(each in err for each in says), err
    assert "unexpected error" not in err


def folders(path: Path, names: list[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    numbers = np.random.default_rng(0)
    for name in names:
        (path / name).mkdir(parents=True)
        for index in range(3):
            pixels = numbers.integers(0, 256, (8, 8, 3)).astype("uint8")
            image.fromarray(pixels).save(path / name / f"{index}.png")


def summary(folder: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(Path(folder, "report.json").read_text())
    return report


RANDOM = "timm:test_resnet.r160_in1k"
SAYING = {
    "looking": [f"inspect {RANDOM}", f"fold {RANDOM} --dry-run"],
    "rewriting": [f"fold {RANDOM} --out made", f"freeze {RANDOM} --out frozen"],
    "fitting": [
        f"convert {RANDOM} --to layer_norm --out made",
        f"calibrate made --teacher {RANDOM} --data x.npz --out calibrated",
        "inspect made",  # a folder remembers
    ],
    "shipping": [f"export {RANDOM} --out made", f"validate made/model.onnx {RANDOM}"],
    "comparing": [f"compare {RANDOM} {RANDOM} --out made"],
}


@pytest.mark.parametrize("lines", SAYING.values(), ids=SAYING)
def test_every_command_says_that_weights_are_random(
    lines: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr("normswap.report.measurements.latencies", lambda *_: ())
    np.savez("x.npz", x=np.zeros((10, 3, 160, 160), np.float32))
    for line in lines:
        status, out, err = run(line)
        assert status == 0, (line, err)
        assert "RANDOM WEIGHTS" in out, line
    if Path("made").exists():
        assert "random" in summary("made")["weights"].values()
        assert "RANDOM WEIGHTS" in Path("made/report.html").read_text()


def test_the_json_of_a_dry_run_is_a_plan_and_stderr_says_that_weights_are_random(run: Run) -> None:
    pytest.importorskip("timm")
    status, out, err = run(f"fold {RANDOM} --dry-run --json")
    assert status == 0 and normswap.Plan.from_json(out).edits and "RANDOM WEIGHTS" in err


def test_weights_that_were_loaded_are_not_random(run: Run) -> None:
    pytest.importorskip("timm")
    save_file(normswap.source.resolve(RANDOM).model.state_dict(), "mine.safetensors")
    found = json.loads(run(f"inspect {RANDOM} --checkpoint mine.safetensors --json")[1])
    assert found["weights"] == "checkpoint mine.safetensors"
    assert "RANDOM" not in run("inspect demo:digits")[1]


def test_arguments_of_a_library_stand_behind_the_name(run: Run) -> None:
    pytest.importorskip("timm")
    opened = normswap.source.resolve("timm:test_resnet?num_classes=7&in_chans=1")
    assert opened.model(opened.inputs).shape == (2, 7)
    assert opened.inputs.shape[1] == 1
    opened = normswap.source.resolve("torchvision:resnet18?num_classes=7")
    assert opened.model.fc.out_features == 7
    assert run("fold timm:test_resnet?num_classes=7")[0] == 0
    assert (Path("normswap-out") / "test_resnet-fold" / "report.json").exists()
    assert normswap.load("normswap-out/test_resnet-fold").fc.out_features == 7
    refused(run("inspect timm:test_resnet?colour=3"), "colour")
    refused(run("inspect timm:test_resnet?num_classes"), "NAME?key=value")
    refused(run("inspect timm:test_resnet?checkpoint_path=x"), "--checkpoint")
    refused(run("inspect timm:test_resnet.none"), "no weights 'none'", "r160_in1k")
    refused(run("inspect torchvision:resnet18.none"), "no weights 'none'", "IMAGENET1K_V1")


def test_pretrained_weights_without_a_network_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("huggingface_hub")

    def nowhere(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    for model in ("timm:test_resnet", "torchvision:resnet18"):
        refused(run(f"inspect {model} --pretrained"), "check the network", "--checkpoint")
    refused(run("inspect demo:digits --pretrained"), "leave --pretrained out")
    refused(run("fold demo:digits --pretrained --checkpoint x"), "exclude each other")


def test_class_folders_that_are_not_the_models_are_refused(run: Run) -> None:
    folders(Path("two"), ["cat", "dog"])
    convert = "convert nets.py:net --to group_norm --groups 2 --data"
    refused(run(f"{convert} two"), "2 classes", "10 outputs", "--classes")
    refused(run("finetune nets.py:net --steps 1 --data two"), "2 classes")
    refused(run("compare nets.py:net nets.py:net --test two"), "2 classes")

    Path("names.txt").write_text("\n".join(["a", "dog", "b", "cat", *"cdefgh"]) + "\n")
    data = normswap.fit.data.open_named("two", None, None, None, classes=["a", "dog", "b", "cat"])
    assert {*torch.cat([y for _, y in data]).tolist()} == {1, 3}
    status, _, err = run(f"{convert} two --classes names.txt --out named")
    assert status == 0, err
    assert "original" in summary("named")["accuracy"]
    Path("short.txt").write_text("cat\nbird\n")
    refused(run(f"{convert} two --classes short.txt"), "'dog'", "2 classes")
    Path("first.txt").write_text("cat\ndog\nbird\n")
    refused(run(f"{convert} two --classes first.txt"), "3 classes", "10 outputs")
    refused(run(f"{convert} two --classes none.txt"), "none.txt")
    assert run(f"{convert} two --ignore-labels --out unlabelled")[0] == 0
    assert summary("unlabelled")["accuracy"] == {}


def test_folders_called_by_their_index_have_it_as_their_label(run: Run) -> None:
    folders(Path("numbered"), ["03", "9", "10"])
    data = normswap.fit.data.open_named("numbered", None, None, None)
    assert {*torch.cat([y for _, y in data]).tolist()} == {3, 9, 10}
    compare = "compare nets.py:net nets.py:net --out compared --test"
    refused(run(f"{compare} numbered"), "labels go from 3 to 10", "10 outputs")
    (Path("numbered") / "10").rename("numbered/4")
    assert run(f"{compare} numbered")[0] == 0
    assert summary("compared")["accuracy"].keys() == {"A", "B"}


def test_labels_above_the_outputs_are_refused(run: Run) -> None:
    np.savez("y.npz", x=np.zeros((40, 3, 8, 8), np.float32), y=np.full(40, 12))
    convert = "convert nets.py:net --to group_norm --groups 2 --data y.npz"
    refused(run(convert), "labels go from 12 to 12", "10 outputs")
    assert run(f"{convert} --ignore-labels")[0] == 0


def test_compare_measures_on_what_no_other_command_has_learned_from(run: Run) -> None:
    x, y = digits_data("train")
    np.savez("data.npz", x=x[:200].numpy(), y=y[:200].numpy())
    assert run("convert demo:digits --to group_norm --data data.npz --out out")[0] == 0
    assert run("compare demo:digits out --data data.npz --out compared")[0] == 0
    learned, compared = summary("out"), summary("compared")
    assert compared["measured_on"] == learned["measured_on"] == "40 samples of data.npz, held out"
    assert compared["accuracy"]["B"] == learned["accuracy"]["calibrated"]
    status, out, _ = run("compare demo:digits out --test data.npz --out tested")
    assert status == 0 and "measured on" in out and summary("tested")["measured_on"] == "data.npz"


def test_compare_refuses_outputs_of_different_shapes(run: Run) -> None:
    refused(run("compare nets.py:net nets.py:four"), "A gives 2x10", "B gives 2x4")
    assert not Path("normswap-out").exists()


def test_a_result_is_not_replaced_without_a_word(run: Run) -> None:
    convert = "convert demo:digits --to group_norm --groups 2"
    for name in ("digits-group_norm", "digits-group_norm-2", "digits-group_norm-3"):
        status, out, _ = run(convert)
        assert status == 0 and f"normswap-out/{name}" in out.replace("\\", "/")
    assert run(f"{convert} --out mine")[0] == 0
    before = load_file("mine/model.safetensors")
    refused(run("convert demo:digits --to layer_norm --out mine"), "model.safetensors", "--force")
    refused(run("fold demo:digits --out mine"), "holds a result already")
    refused(run("compare demo:digits demo:digits --out mine"), "holds a result already")
    after = load_file("mine/model.safetensors")
    assert before.keys() == after.keys()
    assert run("convert demo:digits --to layer_norm --out mine --force")[0] == 0
    assert normswap.plan_of(normswap.load("mine")).changed
    refused(run("fold demo:digits --force"), "--out")


def test_an_onnx_file_is_not_replaced_without_a_word(run: Run) -> None:
    export = "export demo:digits --out mine.onnx"
    assert run(export)[0] == 0
    before = Path("mine.onnx").read_bytes()
    refused(run(f"{export} --opset 17"), "mine.onnx", "--force")
    assert Path("mine.onnx").read_bytes() == before
    assert run(f"{export} --opset 17 --force")[0] == 0
    assert onnx.load("mine.onnx").opset_import[0].version == 17


def test_a_folder_that_is_calibrated_further_says_so(run: Run) -> None:
    assert run("convert demo:digits --to group_norm --groups 2 --out mine")[0] == 0
    calibrate = "calibrate mine --teacher demo:digits --data demo:digits --samples 100"
    status, _, err = run(calibrate)
    assert status == 0 and "took the place of the model in mine" in err
    refused(run(f"{calibrate} --out nets.py"), "nets.py")
    assert run(f"{calibrate} --out other")[0] == 0
    refused(run(f"{calibrate} --out other"), "--force")


def test_inspect_and_fold_have_one_answer(run: Run) -> None:
    _, out, _ = run("inspect nets.py:functional")
    assert "can be folded: 1 of 1" in out and "into conv" in out
    model, x = digits(), torch.randn(2, 1, 8, 8)
    program = torch.export.export(model, (x,))
    torch.export.save(program, "digits.pt2")
    seen = normswap.inspect(program)
    decided = normswap.plan(program.module(), normswap.Fold(), inputs=x)
    removed = {edit.site for edit in decided.edits if edit.effect == "removes"}
    assert seen.foldable == removed and removed
    assert f"can be folded: {len(removed)} of 8" in run("inspect digits.pt2")[1]


def test_a_fold_without_an_example_says_that_it_was_not_checked(run: Run) -> None:
    status, out, _ = run("fold nets.py:no_inputs --out out")
    assert status == 0 and "not checked" in out and "--input" in out
    assert "Not checked" in Path("out/report.html").read_text()
    assert "not checked" not in run("fold nets.py:net --out other")[1]


MODEL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
X = torch.ones(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: normswap.convert(MODEL, nn.GroupNorm), "as in 'group_norm'"),  # type: ignore[arg-type]
        (lambda: normswap.convert(MODEL, nn.BatchNorm2d), "as in 'batch_norm'"),  # type: ignore[arg-type]
        (lambda: normswap.fold(MODEL.state_dict(), X), "a state dict"),  # type: ignore[arg-type]
        (lambda: normswap.inspect(MODEL.state_dict()), "a state dict"),  # type: ignore[arg-type]
        (lambda: normswap.save(MODEL.state_dict(), "out"), "a state dict"),  # type: ignore[arg-type]
        (lambda: normswap.fold("torchvision:resnet18", X), "the text"),  # type: ignore[arg-type]
        (lambda: normswap.fold(nn.BatchNorm2d, X), "the class"),  # type: ignore[arg-type]
        (lambda: normswap.reestimate(MODEL.state_dict(), [X]), "a state dict"),  # type: ignore[arg-type]
        (lambda: normswap.advise({}), "a state dict"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_model_or_method_is_told_in_one_line(call: Any, says: str) -> None:
    with pytest.raises(normswap.NormswapError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_folder_is_loaded_into_a_copy_of_the_model_it_was_converted_from(tmp_path: Path) -> None:
    converted = normswap.convert(MODEL, "group_norm", inputs=X, groups=2)
    normswap.save(converted, tmp_path)
    loaded = normswap.load(tmp_path, source=MODEL)
    torch.testing.assert_close(loaded(X), converted(X), rtol=0, atol=0)
    assert isinstance(MODEL[1], nn.BatchNorm2d)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_checkpoint_that_is_none_says_what_it_is(run: Run) -> None:
    model, x = digits(), torch.randn(2, 1, 8, 8)
    torch.jit.trace(model, x).save("scripted.pt")
    torch.export.save(torch.export.export(model, (x,)), "program.pt2")
    Path("file.onnx").write_bytes(b"x")
    for name, says in (
        ("scripted.pt", "TorchScript"),
        ("program.pt2", "torch.export"),
        ("file.onnx", "ONNX"),
    ):
        refused(run(f"inspect demo:digits --checkpoint {name}"), says, "not a state dict")
    hyper = {"pytorch-lightning_version": "2.0", "hyper_parameters": {"path": Path("x")}}
    torch.save({"state_dict": model.state_dict(), **hyper}, "lightning.ckpt")
    refused(run("inspect demo:digits --checkpoint lightning.ckpt"), "Lightning", "'state_dict'")


def test_an_entry_of_a_checkpoint_is_chosen_by_its_key(run: Run) -> None:
    weights = digits().state_dict()
    wrapped = {f"a.b.{name}": value + 1 for name, value in weights.items()}
    torch.save({"state_dict": wrapped, "state_dict_ema": weights}, "both.pt")
    opened = normswap.source.resolve(
        "demo:digits", checkpoint=Path("both.pt"), checkpoint_key="state_dict"
    )
    assert opened.renamed == "takes 'state_dict', leaves out 'a.b.'"
    held = opened.model.state_dict()
    assert all(torch.equal(held[name], value + 1) for name, value in weights.items())
    _, _, err = run("inspect demo:digits --checkpoint both.pt --checkpoint-key state_dict")
    assert "leaves out 'a.b.'" in err
    wrong = "inspect demo:digits --checkpoint both.pt --checkpoint-key ema"
    refused(run(wrong), "no state dict at 'ema'", "state_dict_ema")
    refused(run("inspect demo:digits --checkpoint-key ema"), "--checkpoint")


def test_the_summary_says_what_became_of_the_images(run: Run) -> None:
    folders(Path("images"), [str(index) for index in range(10)])
    convert = "convert nets.py:net --to group_norm --groups 2 --data images"
    status, out, err = run(f"{convert} --crop-pct 0.8 --interpolation bicubic --std 1,1,1 --out o")
    assert status == 0, err
    told = summary("o")["images"]
    assert told in " ".join(out.split())
    assert told.startswith("resized to cover 10x10 (bicubic), center crop 8x8, mean 0.485")
    assert "std 1,1,1" in told
    assert "bicubic" in Path("o/report.html").read_text()
    refused(run(f"{convert} --interpolation cubic"), "bicubic")
    refused(run(f"{convert} --crop-mode middle"), "center, squash")


def test_raw_pixels_are_what_a_model_gets_that_has_absorbed_the_normalization(run: Run) -> None:
    folders(Path("images"), [str(index) for index in range(10)])
    given = "--mean 0.1,0.2,0.3 --std 0.4,0.5,0.6"
    assert run(f"absorb-input nets.py:net {given} --out raw")[0] == 0
    images = normswap.store.resolve("raw", source="nets.py:net").images
    raw, usual = (
        torch.cat([x for x, _ in normswap.fit.data.open_named("images", X, None, None, **how)])
        for how in ({"preprocessing": images}, {})
    )
    assert 200 < raw.max() <= 255 and usual.max() < 3
