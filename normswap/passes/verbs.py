"""The verbs of the public API: each plans one pass and carries it out."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from normswap.graph.copies import copied
from normswap.graph.snapshot import all_or_nothing
from normswap.passes.absorb_input import AbsorbInput
from normswap.passes.bake import Bake
from normswap.passes.center import Center
from normswap.passes.fold import Fold
from normswap.passes.freeze import Freeze, Mode, Unfreeze
from normswap.passes.parametrize import Parametrize
from normswap.passes.plan import plan
from normswap.passes.replacement import replacement
from normswap.passes.selection import Globs
from normswap.source.program import opened


def convert(
    model: nn.Module | ExportedProgram,
    to: str,
    *,
    inputs: Any = None,
    data: Any = None,
    include: Globs | None = None,
    exclude: Globs = (),
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Replace normalizations by the method `to`, and with `data` calibrate the new ones.

    Args:
        inputs: example inputs (a tensor, a tuple of positional ones or a dict of keyword ones);
            by default the first batch of `data`.
        data: batches on which the new gains and biases are fitted to the original's outputs, and
            the number of groups of each site is chosen where it is not given.
        include, exclude: globs on the names of the normalizations; by default every BatchNorm.
        inplace: change `model` itself.
        options: of the method, as `normswap.methods()[to].options` lists them.

    Returns:
        The converted model, in the mode the original is in.

    Raises:
        NormswapError: an unknown method, an option that does not fit, a site that would be erased.
    """
    model, inputs = opened(model, inputs)
    replace = replacement(to, include=include, exclude=exclude, **options)
    if data is None:
        return plan(model, replace, inputs=inputs).apply(model, inplace=inplace)
    # fit stands after passes in the flow of data; only this verb, which joins the two, looks ahead.
    from normswap.fit.calibrate import calibrate, replaced_norms
    from normswap.fit.conversion import decide, first_inputs, repeatable

    data = repeatable(data)
    inputs = first_inputs(model, data) if inputs is None else inputs
    with all_or_nothing(model):
        owned, decided = decide(model, replace, inputs, data)
        model = owned.apply(model, inplace=inplace) if owned.edits else model
        if replace.method.keeps == "exact":  # it leaves nothing to fit
            return decided.apply(model, inplace=inplace)
        teacher = copied(model) if inplace else model
        student = decided.apply(model, inplace=inplace)
        return calibrate(student, teacher, data) if replaced_norms(student, teacher) else student


def fold(
    model: nn.Module | ExportedProgram,
    inputs: Any,
    *,
    channels_last: bool = False,
    duplicate: bool = False,
    pad: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Absorb frozen BatchNorm statistics into the weights around them, exactly.

    Args:
        inputs: example inputs, which show the dataflow; with None only what a symbolic trace shows
            is folded. What the forward decides by a shape, or by whether an argument is given, is
            decided as for these; give two samples or more.
        channels_last: lay the weights out for convolutions on a CPU.
        duplicate: copy an embedding or a convolution of one weight per channel whose output others
            use as well, so that a BatchNorm can be folded into it. The copy takes memory.
        pad: fold a BatchNorm into a convolution after it that pads with zeros, too, where that is
            cheaper. It holds what the shift makes of an output: the memory of one sample's.

    Returns:
        The same function in eval mode, to rounding, with fewer modules. What no weight can absorb
        is left as one scale and shift per channel: `plan(model, Fold(), inputs=inputs)` says why.

    Raises:
        NormswapError: statistics that are NaN or negative, or a model without BatchNorm.
    """
    model, inputs = opened(model, inputs)
    each = Fold(channels_last=channels_last, duplicate=duplicate, pad=pad)
    return plan(model, each, inputs=inputs).apply(model, inplace=inplace)


def absorb_input(
    model: nn.Module,
    inputs: Any,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    inplace: bool = False,
) -> nn.Module:
    """Let `model` take raw pixels: (x / 255 - mean) / std moves into its first layers, exactly.

    Args:
        inputs: example inputs as the model takes them now, normalized. The first floating-point
            tensor, (N, C, ...), is the one.
        mean, std: per channel, of values from 0 to 1, as torchvision and timm give them.

    Returns:
        A model of which that input is uint8, or floating-point numbers, from 0 to 255.

    Raises:
        NormswapError: something on the way stops it; the message names it.
    """
    each = AbsorbInput(mean, std)
    return plan(model, each, inputs=inputs).apply(model, inplace=inplace)


def freeze(
    model: nn.Module | ExportedProgram,
    inputs: Any = None,
    *,
    mode: Mode = "eval",
    inplace: bool = False,
) -> nn.Module:
    """Fix BatchNorm statistics for fine-tuning: no train() thaws them, only `unfreeze`.

    Args:
        inputs: example inputs; mode "tune" needs them to see the dataflow.
        mode: "eval": normalize with the running statistics. "tune": the same function and
            gradients, computed by the weight before (Jiang et al. 2023, arXiv 2305.11624), which
            saves the memory of the BatchNorm's activations.

    Raises:
        NormswapError: statistics that are NaN or negative, or a model without BatchNorm.
    """
    model, inputs = opened(model, inputs)
    return plan(model, Freeze(mode), inputs=inputs).apply(model, inplace=inplace)


def unfreeze(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo `freeze`: the BatchNorms train again, with the values their parameters have now."""
    return plan(model, Unfreeze()).apply(model, inplace=inplace)


def parametrize(
    model: nn.Module,
    method: str,
    *,
    inputs: Any = None,
    include: Globs | None = None,
    exclude: Globs = (),
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Let `method` compute the weights of convolutions and Linears (torch's parametrizations).

    Args:
        inputs: example inputs, for a method that depends on the size of what a convolution sees.
        include, exclude: globs on the names of those modules; by default all of them.
        options: of the method, as `normswap.methods()[method].options` lists them.

    Returns:
        The same function, to rounding, where the method can keep it (`methods()[method].keeps`).

    Raises:
        NormswapError: an unknown method or option, or no module is selected.
    """
    each = Parametrize(method, include=include, exclude=exclude, **options)
    return plan(model, each, inputs=inputs).apply(model, inplace=inplace)


def center(
    model: nn.Module, inputs: Any, *, inplace: bool = False, trainable: bool = False
) -> nn.Module:
    """Turn LayerNorms into RMSNorms, exactly, by taking the mean off their inputs in weights.

    Args:
        inputs: example inputs, which show the dataflow.
        trainable: keep it exact while the model trains: the weights are parametrized and centered
            whenever they are used. By default they are centered once.

    Returns:
        The same function, to rounding. What stays a LayerNorm:
        `plan(model, Center(), inputs=inputs)` says why.

    Raises:
        NormswapError: a model without LayerNorm.

    Source: Jiang et al. 2023 (arXiv 2305.14858).
    """
    return plan(model, Center(trainable=trainable), inputs=inputs).apply(model, inplace=inplace)


def bake(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every parametrized tensor by its value; no parametrization is left."""
    return plan(model, Bake()).apply(model, inplace=inplace)
