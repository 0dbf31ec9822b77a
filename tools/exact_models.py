"""The transformers that bench_exact rewrites: architectures of three libraries, random weights.

Those of transformers are small (two layers, 32 channels), those of torchvision and timm as they
are. Every gain is drawn between 0.5 and 1.5 and every bias from a normal distribution, as a model
fresh from its factory has gains of 1, with which a wrong fold is right. Transformers needs no more
than `pip install --no-deps transformers` and what that asks for on import.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_models import timm, torchvision

Built = tuple[nn.Module, Any]  # a model and its example inputs
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_VISION = {key: _SMALL[key] for key in list(_SMALL)[:4]} | {"image_size": 32, "patch_size": 8}

# By the name of the architecture: the class of the model and the options of its configuration.
LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 32},
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{key: _SMALL[key] for key in list(_SMALL)[:3]},
            **{"ffn_dim": 48, "vocab_size": 50, "max_position_embeddings": 32},
            "word_embed_proj_dim": 32,
        },
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL),
    "Falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**{key: _SMALL[key] for key in list(_SMALL)[:3]}, "vocab_size": 50},
    ),
    "Cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4},
    ),
    "BERT": ("BertForSequenceClassification", "BertConfig", _SMALL),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50},
    ),
    "CLIP": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", _VISION),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", _VISION),
    "ViT": ("ViTForImageClassification", "ViTConfig", _VISION),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4},
            **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
            **{"encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20},
            **{"max_target_positions": 20, "vocab_size": 50, "pad_token_id": 0},
            "decoder_start_token_id": 1,
        },
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_SMALL,
            **{"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4)},
            **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16},
            **{"num_conv_pos_embedding_groups": 4, "do_stable_layer_norm": True},
            "feat_extract_norm": "layer",
        },
    ),
}
_IMAGES = {
    "torchvision:vit_b_16": 224,
    "torchvision:swin_t": 224,
    "timm:vit_tiny_patch16_224": 224,
    "timm:deit3_small_patch16_224": 224,
    "timm:mixer_s16_224": 224,
    "timm:swin_tiny_patch4_window7_224": 224,
    "timm:convnext_atto": 96,
    "timm:eva02_tiny_patch14_224": 224,
    "timm:maxvit_nano_rw_256": 256,
}
MODELS = (*(f"transformers:{name}" for name in LANGUAGE), *_IMAGES)


def load(name: str) -> Built:
    """A model in eval mode with its inputs, in float64 where its operators have that."""
    torch.manual_seed(0)
    library, _, which = name.partition(":")
    if library == "transformers":
        model, inputs = _of_transformers(which)
    else:
        side = _IMAGES[name]
        make: Callable[..., nn.Module] = (
            timm.create_model if library == "timm" else torchvision.models.get_model
        )
        model, inputs = make(which), torch.randn(2, 3, side, side)
    with torch.no_grad():
        for parameter_name, each in model.named_parameters():
            if each.dim() == 1:
                gain = "weight" in parameter_name or "gamma" in parameter_name
                each.uniform_(0.5, 1.5) if gain else each.normal_()
            elif library == "transformers" or not each.any():
                # With what these start from the outputs depend on the input too little, or not.
                each.normal_(0, each[0].numel() ** -0.5)
    if which == "Mixtral":  # torch multiplies groups in float32 at most
        return model.eval(), inputs
    double = torch.utils._pytree.tree_map_only(
        Tensor, lambda each: each.double() if each.is_floating_point() else each, inputs
    )
    return model.eval().double(), double


def _of_transformers(which: str) -> Built:
    import transformers

    cls, config, options = LANGUAGE[which]
    model = getattr(transformers, cls)(getattr(transformers, config)(**options))
    tokens = torch.randint(5, 50, (2, 7))
    if which in ("CLIP", "DINOv2", "ViT"):
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    if which == "Wav2Vec2":
        return model, {"input_values": torch.randn(2, 2000)}
    if which == "Whisper":
        inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens}
        return model, {**inputs, "use_cache": False}
    if which == "T5":
        return model, {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}
    return model, {"input_ids": tokens} if which == "BERT" else {
        "input_ids": tokens,
        "use_cache": False,
    }


class InFloat64(TorchDispatchMode):
    """Inside, a model in float64 computes in float64 what its code casts to float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        casts = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if casts and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
