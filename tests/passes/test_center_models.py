"""Center on the architectures of torchvision, timm and transformers, with random weights."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Center


def build(model: nn.Module) -> nn.Module:
    """With gains, biases and constants that do something, and no weight of zeros."""
    randomise(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias") and tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
            elif not tensor.any() or name.endswith(("gamma", "layer_scale")):
                tensor.copy_(torch.rand(tensor.shape) * 0.1 + 0.01)
    return model.eval()


def centered(model: nn.Module, inputs: Any, call: Any = in_eval) -> tuple[int, int, dict[str, str]]:
    """How many LayerNorms there are before and after, and why; the outputs agree to 1e-5."""
    plan = ns.plan(model, Center(), inputs=inputs)
    result = plan.apply(model)
    assert error(call(result, inputs), call(model, inputs)) <= 1e-5
    before, after = (
        sum(isinstance(each, nn.LayerNorm) for each in every.modules()) for every in (model, result)
    )
    assert after == len(plan.left)
    return before, after, {each.site: each.reason for each in plan.left}


IMAGE = torch.randn(1, 3, 112, 112)
SMALL = {"img_size": 64, "embed_dim": 48, "num_heads": 3}


@pytest.mark.parametrize(
    ("create", "size", "before", "after"),
    [
        (lambda: torchvision.models.VisionTransformer(32, 8, 3, 4, 48, 96), 32, 7, 0),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=3, **SMALL), 64, 7, 0),
        (lambda: timm.create_model("deit3_small_patch16_224", depth=3, **SMALL), 64, 7, 0),
        (lambda: timm.models.MlpMixer(img_size=64, num_blocks=3, embed_dim=24), 64, 7, 0),
        (lambda: timm.create_model("vit_base_patch16_clip_224", depth=2, **SMALL), 64, 6, 0),
    ],
    ids=["torchvision_vit", "vit", "deit3", "mixer", "clip"],
)
def test_no_layer_norm_is_left(create: Any, size: int, before: int, after: int) -> None:
    counts = centered(build(create()), IMAGE[..., :size, :size])[:2]
    assert counts == (before, after)


@pytest.mark.parametrize(
    "create",
    [
        lambda: torchvision.models.SwinTransformer([4, 4], 12, [2, 2], [1, 3, 6], [7, 7]),
        lambda: timm.models.SwinTransformer(112, 4, depths=(2, 2), embed_dim=12, num_heads=(3, 6)),
    ],
    ids=["torchvision", "timm"],
)
def test_swin_is_freed_after_its_last_patch_merging_and_at_its_patches(create: Any) -> None:
    """Before a merging the stream is seen raw: LayerNorm of four positions beside one another."""
    before, after, reasons = centered(build(create()), IMAGE[..., :112, :112])
    assert (before, after) == (11, 5)
    assert all("downsample" in why or "cat" in why for why in reasons.values())


def test_convnext_is_freed_at_its_patches_alone() -> None:
    model = build(timm.create_model("convnext_atto", dims=(8, 16, 24, 32)))
    _, after, reasons = centered(model, IMAGE[..., :64, :64])
    assert after == 16
    assert "conv_dw" in reasons["stages.0.blocks.0.norm"]
    assert "stem.1" not in reasons


def first(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of a model of transformers."""
    with torch.no_grad():
        return model(**inputs)[0]


IDS = {"input_ids": torch.arange(24).view(2, 12)}


@pytest.mark.parametrize("head", ["GPT2Model", "GPT2LMHeadModel"])
def test_gpt2_is_freed_with_its_embedding_tied_or_not(head: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=3, n_embd=48, n_head=4, vocab_size=50, n_positions=16, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = build(getattr(transformers, head)(config))
    assert centered(model, IDS, first)[:2] == (7, 0)


def test_bert_is_freed_at_its_embeddings_alone() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=48, num_attention_heads=4, intermediate_size=96,
        vocab_size=50,
    )  # fmt: skip
    before, after, reasons = centered(build(transformers.BertModel(config)), IDS, first)
    assert (before, after) == (5, 4)
    assert "query" in reasons["encoder.layer.0.attention.output.LayerNorm"]
