"""save and load: the same function from source, recipe and weights, and nothing run unasked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap.core.errors import NormswapError
from normswap.passes.recipe import set_source
from normswap.store import resolve

FACTORY = """
import pathlib
from torch import nn

def factory():
    pathlib.Path(__file__).with_suffix(".ran").touch()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
"""
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def factory(tmp_path: Path) -> str:
    file = tmp_path / "model.py"
    file.write_text(FACTORY)
    return f"{file}:factory"


def randomised(reference: str) -> nn.Module:
    model = resolve(reference).model.eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    set_source(model, reference)
    return model


REWRITES = {
    "group_norm": lambda model: normswap.convert(model, "group_norm", inputs=X),
    "rms_norm": lambda model: normswap.convert(model, "rms_norm", inputs=X),
    "fold": lambda model: normswap.fold(model, X),
    "freeze": lambda model: normswap.freeze(model, X),
    "tune": lambda model: normswap.freeze(model, X, mode="tune"),
    "tune, bake": lambda model: normswap.bake(normswap.freeze(model, X, mode="tune")),
    "freeze, unfreeze": lambda model: normswap.unfreeze(normswap.freeze(model, X, mode="tune")),
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES.keys())
def test_a_saved_rewrite_loads_as_the_same_function(rewrite, factory, tmp_path):
    model = rewrite(randomised(factory))
    normswap.save(model, tmp_path / "saved")
    again = normswap.load(tmp_path / "saved", source=factory)
    assert [type(m).__name__ for m in again.modules()] == [
        type(m).__name__ for m in model.modules()
    ]
    assert again.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(again.eval()(X), model.eval()(X), rtol=0, atol=0)


def test_an_own_source_loads_without_being_named(tmp_path):
    source = resolve("demo:digits")
    set_source(source.model, "demo:digits")
    folded = normswap.fold(source.model, source.inputs)
    normswap.save(folded, tmp_path / "saved")
    again = normswap.load(tmp_path / "saved")
    torch.testing.assert_close(again(source.inputs), folded(source.inputs), rtol=0, atol=0)


def test_half_precision_comes_back_as_it_was(factory, tmp_path):
    model = normswap.convert(randomised(factory).half(), "group_norm")
    normswap.save(model, tmp_path / "saved")
    again = normswap.load(tmp_path / "saved", source=factory)
    assert {p.dtype for p in again.parameters()} == {torch.float16}


def test_a_recipe_does_not_choose_the_code_that_runs(factory, tmp_path):
    normswap.save(normswap.fold(randomised(factory), X), tmp_path / "saved")
    trace = tmp_path / "model.ran"
    trace.unlink()
    with pytest.raises(NormswapError, match="is not run automatically"):
        normswap.load(tmp_path / "saved")
    assert not trace.exists()


def test_another_architecture_is_refused_with_the_difference(factory, tmp_path):
    normswap.save(normswap.fold(randomised(factory), X), tmp_path / "saved")
    file = tmp_path / "model.py"
    file.write_text(FACTORY.replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(NormswapError, match="2 was ReLU, is GELU"):
        normswap.load(tmp_path / "saved", source=factory)
    file.write_text(FACTORY.replace("8, 3", "16, 3").replace("Norm2d(8)", "Norm2d(16)"))
    with pytest.raises(NormswapError, match="was 8x3x3x3, is 16x3x3x3"):
        normswap.load(tmp_path / "saved", source=factory)


def test_the_recipe_lies_in_the_weights_and_beside_them(factory, tmp_path):
    normswap.save(normswap.fold(randomised(factory), X), tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", framework="pt") as file:
        inside = json.loads(file.metadata()["normswap.recipe"])
    beside = json.loads((tmp_path / "saved/recipe.json").read_text())
    assert inside == beside
    assert inside["source"] == factory
    assert inside["passes"] == ["Fold"]


def damaged(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "no recipe":
        save_file(load_file(file), file)
    elif how == "bad recipe":
        save_file(load_file(file), file, {"normswap.recipe": '{"edits": [{"edit": "exec"}]}'})
    elif how == "other weights":
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({"0.weight": torch.zeros(8, 3, 3, 3)}, file, metadata)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "there is no"),
        ("truncated", "damaged"),
        ("no recipe", "holds no recipe"),
        ("bad recipe", "cannot be read"),
        ("other weights", "do not fit its recipe"),
    ],
)
def test_a_damaged_folder_is_one_line(how, says, factory, tmp_path):
    normswap.save(normswap.fold(randomised(factory), X), tmp_path / "saved")
    damaged(tmp_path / "saved", how)
    with pytest.raises(NormswapError, match=says) as error:
        normswap.load(tmp_path / "saved", source=factory)
    assert "\n" not in str(error.value)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.b.weight = self.a.weight
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.b(self.a(x).relu()).relu())

    model = normswap.convert(Tied(), "layer_norm", inputs=X)
    normswap.save(model, tmp_path / "saved")
    again = normswap.load(tmp_path / "saved", source=Tied)
    assert again.a.weight is again.b.weight
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)
