"""A network with any normalization is exported and validated in every opset from 13 on."""

import onnx
import pytest
import torch
from torch import nn

import normswap
from normswap.core.errors import NormswapError
from normswap.deploy.export import export

SEQUENCES = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
IMAGES = {"GroupNorm": lambda n: nn.GroupNorm(2, n), "BatchNorm": nn.BatchNorm2d}


@pytest.mark.parametrize("opset", [13, 15, 16, 17, 21, 23])
@pytest.mark.parametrize("name", [*SEQUENCES, *IMAGES])
def test_each_opset_has_the_normalizations(name, opset, tmp_path):
    if name in SEQUENCES:
        model, x = nn.Sequential(nn.Linear(6, 8), SEQUENCES[name](8)), torch.randn(2, 6)
    else:
        model, x = nn.Sequential(nn.Conv2d(3, 8, 3), IMAGES[name](8)), torch.randn(2, 3, 7, 7)
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    report = export(model, x, tmp_path / "m.onnx", opset=opset)
    assert report.passed and report.opset == opset
    written = onnx.load(tmp_path / "m.onnx")
    assert written.opset_import[0].version == opset
    # ONNX Runtime warns of an initializer that nothing reads.
    read = {name for node in written.graph.node for name in node.input}
    assert {each.name for each in written.graph.initializer} <= read


class Centred(nn.Module):
    """Its LayerNorms become RMSNorms in `center`."""

    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Linear(6, 8), nn.LayerNorm(8)
        self.inside, self.last = nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.last(x + self.inside(self.first(x))))


class ByHand(nn.Module):
    """An RMSNorm in the formula, of what is scaled before it is normalized, and with its root."""

    def forward(self, x):
        root = torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3)
        return (2 * x) / root + root


def written(model, x, path, opset):
    report = export(model.eval(), x, path, opset=opset)
    assert report.passed
    return report.operators


def test_an_rms_norm_is_one_operator_from_opset_23_on(tmp_path):
    x = torch.randn(2, 5, 6)
    model = Centred().double()
    for norm in (model.first,):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    centred = normswap.center(model, x.double()).float()
    assert written(centred, x, tmp_path / "m.onnx", 23)["RMSNormalization"] == 2
    assert "RMSNormalization" not in written(centred, x, tmp_path / "m.onnx", 18)
    assert "RMSNormalization" not in written(ByHand(), x, tmp_path / "m.onnx", 23)


def test_a_layer_norm_over_many_values_is_exact_on_a_blank_image_in_an_old_opset(tmp_path):
    report = export(nn.LayerNorm([4, 64, 64]), torch.randn(1, 4, 64, 64), tmp_path / "m", opset=13)
    assert report.passed
    assert next(case for case in report.validation.cases if case.name == "constant").max_abs < 1e-3


class Mish(nn.Module):
    def forward(self, x):
        return nn.functional.mish(x)


def test_an_operator_without_a_form_is_named(tmp_path):
    with pytest.raises(NormswapError, match=r"operator Mish .*no form in opset 17; use opset 18"):
        export(Mish(), torch.randn(2, 3), tmp_path / "m.onnx", opset=17)
    assert list(tmp_path.iterdir()) == []
