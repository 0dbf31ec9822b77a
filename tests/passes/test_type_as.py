"""`x.type_as(y)` is the cast that it is: every verb passes it where `x.to(y.dtype)` passes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import error, in_eval, randomise
from timm.models.eva import Eva
from torch import Tensor, nn

import normswap as ns

WIDTH, WORDS = 12, 11


class OfLlama(nn.Module):
    """RMSNorm of the reference implementation of LLaMA."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


class GainInside(OfLlama):
    """The gain is applied before the cast back."""

    def forward(self, x: Tensor) -> Tensor:
        return (self._norm(x.float()) * self.weight.float()).type_as(x)


class AsTheGain(OfLlama):
    """Its input is cast to the dtype of its gain, as its output is."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.type_as(self.weight)
        return self._norm(x.float()).type_as(self.weight) * self.weight


class OnePlusCast(OfLlama):
    """The gain is 1 + weight, in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * (1 + self.weight.type_as(x))


class LayerInFloat32(nn.LayerNorm):
    """LayerNorm that computes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).type_as(x)


class Attention(nn.Module):
    """Self-attention whose softmax is in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (1.5 * q).type_as(v), k.cos().type_as(v)
        weights = (q @ k.mT).float().softmax(-1).type_as(v)
        return self.out((weights @ v).transpose(1, 2).flatten(2).type_as(x))


class Model(nn.Module):
    """A pre-norm transformer of one block."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(WORDS, WIDTH), Attention()
        self.norm1, self.norm2, self.norm = (norm(WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        x = x + self.attention(self.norm1(x)).type_as(x)
        x = x + self.down(F.gelu(self.up(self.norm2(x)).float()).type_as(x))
        return self.head(self.norm(x))


NORMS = [OfLlama, GainInside, AsTheGain, OnePlusCast, LayerInFloat32]
PASSES: dict[str, Any] = {"gains": ns.FoldAffine, "rotate": lambda: ns.Rotate(heads=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", PASSES)
def test_what_casts_by_type_as_is_rewritten(name: str, norm: Any, dtype: torch.dtype) -> None:
    model = Model(norm)
    randomise(model)
    model.to(dtype).eval()
    words = torch.randint(0, WORDS, (2, 5))
    plan = ns.plan(model, PASSES[name](), inputs=words)
    assert not plan.left and plan.edits
    limit = {torch.float32: 2e-6, torch.bfloat16: 0.03}[dtype]
    assert error(in_eval(plan.apply(model), words), in_eval(model, words)) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_that_casts_by_type_as_is_swapped_for_torchs_own(
    norm: Any, dtype: torch.dtype
) -> None:
    model = Model(norm)
    randomise(model)
    model.to(dtype).eval()
    words = torch.randint(0, WORDS, (2, 5))
    to = "layer_norm" if norm is LayerInFloat32 else "rms_norm"
    swapped = ns.convert(model, to, inputs=words, include="*", per_position=True)
    assert not any(isinstance(module, norm) for module in swapped.modules())
    limit = {torch.float32: 2e-6, torch.bfloat16: 0.03}[dtype]
    assert error(in_eval(swapped, words), in_eval(model, words)) <= limit


def test_heads_of_eva_are_rotated() -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    model = Eva(**sizes, num_classes=7, mlp_ratio=2.0, qkv_fused=False, use_rot_pos_emb=True)
    randomise(model)
    model.double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plan = ns.plan(model, ns.Rotate(heads=True, assume_example=True), inputs=x)
    assert not plan.left
    rotated = {edit.site for edit in plan.edits if edit.edit == "rotate"}
    assert rotated == {"blocks.0.norm1", "blocks.0.attn", "blocks.1.attn"}
    assert error(in_eval(plan.apply(model), x), in_eval(model, x)) <= 1e-10


class Layer(nn.Conv2d):
    """A convolution whose weight is cast to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight.type_as(x), self.bias.type_as(x))


class Branches(nn.Module):
    """Two branches that are merged into one."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (
            norm(conv(x).type_as(x)) for conv, norm in zip(self.convs, self.norms, strict=True)
        )
        return first.type_as(second) + second


@pytest.mark.parametrize("model", [nn.Sequential(Layer(3, 4, 1), nn.BatchNorm2d(4)), Branches()])
def test_batch_norms_fold_through_it(model: nn.Module) -> None:
    model = copy.deepcopy(model)
    randomise(model)
    model.double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    plan = ns.plan(model, ns.Fold(), inputs=x)
    folded = plan.apply(model)
    norms = {name for name, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)}
    assert {edit.site for edit in plan.edits if edit.effect == "removes"} >= norms
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10


def test_raw_pixels_are_not_taken_where_their_dtype_is_cast_to() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).type_as(x).float())

    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(ns.NormswapError, match="does something else with integers"):
        ns.absorb_input(Model().eval(), x, [0.5] * 3, [0.25] * 3)
