"""Prepare a language model of transformers for quantization, without changing what it computes.

Gains of the normalizations go into the weights, and the residual stream is rotated, so that no
channel is far larger than the others. The model stays a LlamaForCausalLM with the same state dict
keys; here it is small and random, with a channel that is far out, as trained models have them.

    python examples/language_model.py
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import normswap


def rounded(weight: Tensor) -> Tensor:
    """`weight` in 4 bits, one step for each row, as a simple quantizer does it."""
    step = weight.abs().amax(1, keepdim=True) / 7
    return (weight / step).round() * step


def lost_in_4_bits(model: nn.Module, tokens: Tensor) -> float:
    """How far the logits move, relative to themselves, when every Linear is rounded."""
    with torch.no_grad():
        exact = model(tokens).logits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight))
        moved = (model(tokens).logits - exact).norm() / exact.norm()
        model.load_state_dict(before)
    return float(moved)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight[7] = 30.0  # the channel that is far out
    tokens = torch.randint(100, (2, 16))

    folded = normswap.fold_gains(model, tokens)
    rotated = normswap.rotate(model, tokens)
    with torch.no_grad():
        exact = model(tokens).logits
        moved = (rotated(tokens).logits - exact).abs().max() / exact.abs().max()
    print(f"rotated: the logits differ by {moved:.0e}, {type(rotated).__name__}")
    print(f"lost in 4 bits, gains folded  {lost_in_4_bits(folded, tokens):.1%}")
    print(f"lost in 4 bits, rotated       {lost_in_4_bits(rotated, tokens):.1%}")


if __name__ == "__main__":
    main()
