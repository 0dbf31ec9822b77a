"""A model that transformers saved is opened with its head, at the size of its image processor."""

from pathlib import Path
from typing import Any

import pytest
import torch

import normswap
from normswap.core.errors import NormswapError
from normswap.store import resolve

transformers = pytest.importorskip("transformers")
SMALL = {"num_labels": 5}
STAGES = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, **SMALL}
EDGE = {"size": {"shortest_edge": 64}}
CROP = {"crop_size": {"height": 64, "width": 64}}
FORMER = {"hidden_sizes": [8] * 4, "depths": [1] * 4, **SMALL}
LAYERS = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
DETR = {
    "backbone": None,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    **dict.fromkeys(LAYERS, 1),
}
# The model's class, its configuration, and its image processor.
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "ResNet": ("ResNetForImageClassification", STAGES, "ConvNextImageProcessor", EDGE),
    "RegNet": (
        "RegNetForImageClassification",
        STAGES | {"groups_width": 8},
        "ConvNextImageProcessor",
        EDGE,
    ),
    "Bit": (
        "BitForImageClassification",
        {"embedding_size": 32, "hidden_sizes": [32] * 4, "depths": [1] * 4, "num_groups": 4}
        | SMALL,
        "BitImageProcessor",
        EDGE | CROP,
    ),
    "Cvt": (
        "CvtForImageClassification",
        {"embed_dim": [8] * 3, "num_heads": [1, 2, 2], "depth": [1, 2, 3]} | SMALL,
        "ConvNextImageProcessor",
        EDGE,
    ),
    "Segformer": (
        "SegformerForSemanticSegmentation",
        FORMER | {"num_attention_heads": [1] * 4, "decoder_hidden_size": 8},
        "SegformerImageProcessor",
        {"size": {"height": 64, "width": 64}},
    ),
    "PoolFormer": (
        "PoolFormerForImageClassification",
        FORMER,
        "PoolFormerImageProcessor",
        EDGE | CROP,
    ),
    "Detr": (
        "DetrForObjectDetection",
        DETR,
        "DetrImageProcessor",
        {"size": {"shortest_edge": 64, "longest_edge": 100}},
    ),
}


def saved(name: str, folder: Path, *, processor: bool = True) -> Any:
    """A model of transformers, in eval mode, that was saved to `folder`."""
    cls, options, processing, images = MODELS[name]
    if name == "Detr":
        backbone = {**STAGES, "out_features": ["stage4"]}
        options = options | {"backbone_config": transformers.ResNetConfig(**backbone)}
    torch.manual_seed(0)
    made = getattr(transformers, cls)(getattr(transformers, f"{name}Config")(**options)).eval()
    made.save_pretrained(folder)
    if processor:
        getattr(transformers, processing)(**images).save_pretrained(folder)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_local_folder_is_opened_with_its_head(name: str, tmp_path: Path) -> None:
    made = saved(name, tmp_path)
    source = resolve(f"hf:{tmp_path}")
    assert type(source.model) is type(made)
    assert source.inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert source.weights == f"pretrained: {tmp_path}"
    ours, theirs = (model(**source.inputs).logits for model in (source.model, made))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_without_a_processor_the_input_is_of_the_usual_size_or_the_users(tmp_path: Path) -> None:
    made = saved("ResNet", tmp_path, processor=False)
    assert resolve(f"hf:{tmp_path}").inputs["pixel_values"].shape == (2, 3, 224, 224)
    source = resolve(f"hf:{tmp_path}", input_shapes=["2x3x32x32"])
    folded = normswap.fold(source.model, source.inputs)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x).logits, made(x).logits, rtol=1e-4, atol=1e-5)


def test_a_path_that_leads_nowhere_is_no_name_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(NormswapError, match="there is no folder"):
        resolve(f"hf:{tmp_path / 'nowhere'}")


def test_tensors_that_a_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    saved("ResNet", tmp_path)
    weights = transformers.ResNetModel.from_pretrained(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        {f"resnet.{name}": each for name, each in weights.items()}, tmp_path / "pytorch_model.bin"
    )
    told = resolve(f"hf:{tmp_path}").weights
    assert "2 tensors that it lacks have RANDOM WEIGHTS: classifier.1.bias" in told


def test_an_architecture_that_is_unknown_is_opened_without_a_head_and_says_so(
    tmp_path: Path,
) -> None:
    saved("ResNet", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("ResNetForImageClassification", "OfNobody"))
    source = resolve(f"hf:{tmp_path}")
    assert type(source.model).__name__ == "ResNetModel" and "without a head" in source.weights


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NormswapError, match="cannot build") as error:
        resolve(f"hf:{tmp_path}")
    assert "\n" not in str(error.value)
