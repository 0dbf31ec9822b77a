"""A reference becomes the model it names; a wrong one becomes one line that helps."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from normswap.core.errors import NormswapError
from normswap.demo.digits import digits
from normswap.graph.running import check_runs
from normswap.graph.supported import check_supported
from normswap.source import Source, parse_input
from normswap.store import resolve

FACTORIES = """
from dataclasses import dataclass
import torch
from torch import nn
from neighbour import CHANNELS

@dataclass
class Options:
    channels: "int" = CHANNELS

def net():
    return nn.Sequential(nn.Conv2d(3, Options().channels, 3), nn.BatchNorm2d(CHANNELS))

def with_inputs():
    return net().eval(), torch.ones(2, 3, 8, 8)

def with_keywords():
    return net(), {"input": torch.ones(2, 3, 8, 8)}

def needy(channels, *, depth):
    return net()

def wrong():
    return [net()]

def failing():
    raise RuntimeError("no such\\nlayer")

def leaving():
    raise SystemExit(3)

number = 3
"""


def _error(call: Callable[[], Any]) -> str:
    with pytest.raises(NormswapError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("CHANNELS = 7\n")
    (tmp_path / "models.py").write_text(FACTORIES)
    return tmp_path / "models.py"


def test_demo_is_the_bundled_model_in_eval_mode() -> None:
    source, x = resolve("demo:digits"), torch.rand(3, 1, 8, 8)
    assert isinstance(source, Source) and source.reference == "demo:digits"
    assert source.inputs.shape == (2, 1, 8, 8)
    assert torch.equal(source.model(x), digits()(x))


def test_factory_in_a_file_finds_its_neighbours_and_leaves_the_path(file: Path) -> None:
    before = list(sys.path)
    source = resolve(f"{file}:net")
    assert source.model[0].out_channels == 7
    assert source.model.training and source.inputs is None
    assert sys.path == before


def test_factory_may_give_its_inputs(file: Path) -> None:
    source = resolve(f"{file}:with_inputs")
    assert not source.model.training
    assert torch.equal(source.inputs, torch.ones(2, 3, 8, 8))
    assert resolve(f"{file}:with_keywords").inputs.keys() == {"input"}


def test_factory_in_a_module_of_the_current_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(file.parent))])
    assert isinstance(resolve("models:net").model, nn.Sequential)
    for name in ("models", "neighbour"):
        sys.modules.pop(name, None)


def test_random_weights_are_the_same_each_time_and_the_random_state_is_kept(file: Path) -> None:
    before = torch.get_rng_state()
    first, second = (resolve(f"{file}:net").model for _ in range(2))
    assert torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoint_is_loaded(file: Path, tmp_path: Path) -> None:
    state = {k: v + 1 for k, v in resolve(f"{file}:net").model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = resolve(f"{file}:net", checkpoint=tmp_path / "w.safetensors").model
    assert torch.equal(model[0].weight, state["0.weight"])


def test_given_shapes_take_the_place_of_the_example(file: Path) -> None:
    reference = f"{file}:with_inputs"
    assert resolve(reference, input_shapes=["1x3x9x9"]).inputs.shape == (1, 3, 9, 9)
    two = resolve(reference, input_shapes=["1x3x9x9", "int64:4"]).inputs
    assert isinstance(two, tuple) and [t.dtype for t in two] == [torch.float32, torch.int64]


@pytest.mark.parametrize("text", ["", "3,224", "1x-3", "axb", "1x", "int7:3", "1x3x224X", "2x0"])
def test_shape_that_is_none_is_refused_with_an_example(text: str) -> None:
    message = _error(lambda: parse_input(text))
    assert repr(text) in message


def test_example_inputs_are_drawn_apart_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    assert torch.equal(parse_input("2x3"), parse_input("2x3"))
    assert parse_input("1000").std() == pytest.approx(1, abs=0.1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nett", "has no factory 'nett'; did you mean net?"),
        ("number", "has no factory 'number'"),
        ("needy", "needs arguments (channels, depth)"),
        ("wrong", "returned list; return a torch.nn.Module"),
        ("failing", "raised RuntimeError: no such;"),
        ("leaving", "raised SystemExit: 3;"),
    ],
)
def test_wrong_factory_is_told_in_one_line(file: Path, name: str, words: str) -> None:
    assert words in _error(lambda: resolve(f"{file}:{name}"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import nosuchlibrary", "raised ModuleNotFoundError: No module named 'nosuchlibrary'"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("def f(:", "raised SyntaxError"),
        ("raise SystemExit(1)", "raised SystemExit: 1"),
    ],
)
def test_file_that_cannot_be_imported_is_told_in_one_line(
    tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "broken.py").write_text(content)
    assert words in _error(lambda: resolve(f"{tmp_path}/broken.py:f"))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("", "unknown model"),
        ("resnet50", "did you mean torchvision:resnet50 or timm:resnet50?"),
        ("torchvision:", "unknown model"),
        ("torchvison:resnet18", "did you mean torchvision:NAME?"),
        ("demo:digit", "did you mean demo:digits?"),
        ("/nowhere/models.py:net", "there is no file '/nowhere/models.py'"),
        ("nosuchpackage.models:net", "there is no module 'nosuchpackage'"),
        ("json.nosuch:net", "there is no module 'json.nosuch'"),
        ("nowhere.pt2", "there is no file 'nowhere.pt2'"),
    ],
)
def test_unknown_source_is_told_with_a_way_out(reference: str, words: str) -> None:
    assert words in _error(lambda: resolve(reference))


@pytest.mark.parametrize("call", [(torch.ones(1, 4),), {"input": torch.ones(1, 4)}])
def test_program_comes_with_the_inputs_it_was_exported_on(tmp_path: Path, call: Any) -> None:
    model = nn.Linear(4, 2)
    args, kwargs = (call, {}) if isinstance(call, tuple) else ((), call)
    torch.export.save(torch.export.export(model, args, kwargs), tmp_path / "m.pt2")
    source = resolve(str(tmp_path / "m.pt2"))
    check_runs(source.model, source.inputs)
    assert torch.equal(source.model(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (2, 3, 224, 224)),
        ("inception_v3", (2, 3, 299, 299)),
        ("segmentation/lraspp_mobilenet_v3_large", (2, 3, 224, 224)),
        ("r3d_18", (2, 3, 16, 112, 112)),
        ("video/s3d", (2, 3, 16, 224, 224)),
    ],
)
def test_torchvision_models_run_on_their_example_inputs(name: str, shape: tuple[int, ...]) -> None:
    pytest.importorskip("torchvision")
    source = resolve(f"torchvision:{name}")
    assert source.inputs.shape == shape
    check_runs(source.model, source.inputs)


def test_detectors_take_a_list_of_images() -> None:
    pytest.importorskip("torchvision")
    source = resolve("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn")
    (images,) = source.inputs
    assert [image.shape for image in images] == [(3, 224, 224)] * 2


def test_zoo_models_are_built_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")

    def download(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr("socket.socket.connect", download)
    resolve("torchvision:fcn_resnet50")
    assert resolve("timm:resnet10t").inputs.shape == (2, 3, 176, 176)


def test_unknown_zoo_name_suggests_the_nearest() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    assert "did you mean resnet50" in _error(lambda: resolve("torchvision:resnet5O"))
    assert "has no model 'video/resnet18'" in _error(lambda: resolve("torchvision:video/resnet18"))
    assert "did you mean resnet50" in _error(lambda: resolve("timm:resnet5O"))


def test_library_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError(f"operator {name}::nms does not exist\nmore")

    monkeypatch.setattr("normswap.source.libraries.import_module", broken)
    told = "nms does not exist); install the torchvision"
    assert told in _error(lambda: resolve("torchvision:resnet18"))
    assert told in _error(lambda: resolve("timm:resnet18"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in _error(lambda: resolve("hf:bert-base-uncased"))


def test_hub_models_never_bring_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    configuration = types.SimpleNamespace(architectures=["OfTheirs"], image_size=32, num_channels=3)

    class AutoConfig:
        @staticmethod
        def from_pretrained(name: str, *, trust_remote_code: bool) -> Any:
            assert not trust_remote_code
            return configuration

    class AutoModel:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
            asked.update(options, name=name)
            model = nn.Conv2d(3, 4, 3)
            model.main_input_name = "pixel_values"
            model.config = configuration
            return model, {"missing_keys": set()}

    fake = types.ModuleType("transformers")
    fake.AutoConfig, fake.AutoModel = AutoConfig, AutoModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", fake)
    source = resolve("hf:org/model")
    assert asked["name"] == "org/model"
    assert asked["trust_remote_code"] is False and asked["weights_only"] is True
    assert source.inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert "without a head" in source.weights  # there is no such class in transformers


def test_float_models_are_supported() -> None:
    check_supported(digits())
    check_supported(nn.Sequential(torch.ao.nn.quantized.FloatFunctional(), nn.BatchNorm2d(3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_model_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    assert "the model is scripted" in _error(lambda: check_supported(scripted))
    inside = nn.Sequential(nn.ReLU(), scripted)
    assert "'1' is scripted" in _error(lambda: check_supported(inside))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_model_is_refused() -> None:
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if not engines:
        pytest.skip("this torch cannot quantize")
    linear = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))
    assert "'0" in (message := _error(lambda: check_supported(linear)))
    assert "quantize after the conversion" in message
    conv = nn.Sequential(torch.ao.nn.quantized.Conv2d(1, 1, 1))
    assert "quantized (Conv2d)" in _error(lambda: check_supported(conv))


def test_uninitialised_lazy_model_is_refused_until_it_has_run() -> None:
    for lazy in (nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d(affine=False), nn.LazyConv2d(2, 3)):
        model = nn.Sequential(lazy)
        assert "run one batch" in _error(lambda model=model: check_supported(model))
        model(torch.randn(2, 3, 8, 8))
        check_supported(model)


class _Restless(nn.Module):
    """Counts its calls, draws numbers, and rejects images that are not 8 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        return self.bn(x) + torch.rand(8)


def test_trial_run_leaves_no_trace() -> None:
    model = _Restless()
    model.bn.eval()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    check_runs(model, torch.ones(2, 3, 8, 8))
    with pytest.raises(NormswapError):
        check_runs(model, torch.ones(2, 3, 8, 9))
    assert model.training and not model.bn.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_rejected_shape_is_told_with_the_models_own_words() -> None:
    message = _error(lambda: check_runs(nn.Linear(4, 2), torch.ones(3, 5)))
    assert "does not run on an input of 3x5: RuntimeError: mat1 and mat2" in message
    assert "--input" in message


@pytest.mark.parametrize("exists", [True, False])
def test_an_onnx_file_is_no_model_to_rewrite(exists, tmp_path):
    if exists:
        (tmp_path / "m.onnx").write_bytes(b"anything")
    with pytest.raises(NormswapError, match=r"ONNX file.*name the model that it was exported from"):
        resolve(str(tmp_path / "m.onnx"))
