"""The verbs of the public API: each plans one pass and carries it out.

What a verb cannot change stays as it was, with the reason: `plan_of(result).left` lists it, and a
warning says how many normalizations that are. The result runs once beside the original, on the
example inputs (`normswap.passes.check`); `check=False` leaves that out.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from normswap.core.ambient import usual_settings
from normswap.core.errors import warn
from normswap.core.types import Inputs
from normswap.passes.absorb_input import AbsorbInput
from normswap.passes.bake import Bake
from normswap.passes.center import Center
from normswap.passes.fold import Fold
from normswap.passes.fold_affine import FoldAffine
from normswap.passes.freeze import Freeze, Mode, Unfreeze
from normswap.passes.parametrize import Parametrize
from normswap.passes.plan import Plan, Skipped, carry_out
from normswap.passes.selection import Globs, was_asked_for
from normswap.source.program import opened


def missed(decided: Plan) -> list[Skipped]:
    """The sites that the plan was asked to change, and leaves."""
    return [each for each in decided.left if was_asked_for(each.reason)]


def warn_of_missed(what: str, decided: Plan) -> None:
    sites = missed(decided)
    if sites:
        first = f"{sites[0].site or 'the model'}: {sites[0].reason}"
        some = "1 normalization was" if len(sites) == 1 else f"{len(sites)} normalizations were"
        warn(
            f"{what}: {some} left, for example {first}; plan_of(result).left has all reasons",
            stacklevel=4,
        )


@usual_settings()
def fold(
    model: nn.Module | ExportedProgram,
    inputs: Inputs,
    *,
    include: Globs | None = None,
    exclude: Globs = (),
    channels_last: bool = False,
    duplicate: bool = False,
    assume_example: bool = False,
    pad: bool = False,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Fold frozen BatchNorm statistics into the weights around them, exactly.

    Args:
        inputs: example inputs, which show the dataflow; with None only what a symbolic trace shows
            is folded. What the forward decides by a size or by an argument is decided as for these:
            give a list of several examples where a model is called in several ways, and what is
            folded holds for all of them.
        include, exclude: globs on the names of the normalizations; by default every BatchNorm.
        channels_last: lay the weights out for convolutions on a CPU.
        duplicate: copy an embedding or a convolution of one weight per channel whose output others
            use as well, so that a BatchNorm can be folded into it. The copy takes memory.
        pad: fold a BatchNorm into a convolution after it that pads with zeros, too, where that is
            cheaper. It holds what the shift makes of an output: the memory of one sample's.
        assume_example: fold also where the model, called in other ways than in the example, may
            give a value to others that the example does not show.
        inplace: change `model` itself.
        check: run the result once on the example inputs, beside the original.

    Returns:
        The same function in eval mode, to rounding, with fewer modules. What no weight can fold in
        is left as one scale and shift per channel: `plan(model, Fold(), inputs=inputs)` says why.

    Raises:
        NormswapError: statistics that are NaN or negative, or a model without BatchNorm.

    Examples:
        >>> import torch
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> folded = normswap.fold(model, images[:2])
        >>> torch.allclose(folded(images[:2]), model.eval()(images[:2]), atol=1e-4)
        True
    """
    model, inputs = opened(model, inputs)
    each = Fold(
        include=include,
        exclude=exclude,
        channels_last=channels_last,
        duplicate=duplicate,
        assume_example=assume_example,
        pad=pad,
    )
    result, decided = carry_out(model, each, inputs=inputs, inplace=inplace, check=check)
    warn_of_missed("fold", decided)
    return result


@usual_settings()
def absorb_input(
    model: nn.Module,
    inputs: Inputs,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    assume_example: bool = False,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Let `model` take raw pixels: (x / 255 - mean) / std moves into its first layers, exactly.

    Args:
        inputs: example inputs as the model takes them now, normalized. The first floating-point
            tensor, (N, C, ...), is the one.
        mean, std: per channel, of values from 0 to 1, as torchvision and timm give them.
        assume_example: the model is called in no other way than in the example.
        inplace: change `model` itself.
        check: run the result once on raw pixels, beside the original.

    Returns:
        A model of which that input is uint8, or floating-point numbers, from 0 to 255.

    Raises:
        NormswapError: something on the way stops it; the message names it.
    """
    each = AbsorbInput(mean, std, assume_example=assume_example)
    return carry_out(model, each, inputs=inputs, inplace=inplace, check=check)[0]


@usual_settings()
def freeze(
    model: nn.Module | ExportedProgram,
    inputs: Inputs | None = None,
    *,
    mode: Mode = "eval",
    include: Globs | None = None,
    exclude: Globs = (),
    assume_example: bool = False,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Fix BatchNorm statistics for fine-tuning: no train() thaws them, only `unfreeze`.

    Args:
        inputs: example inputs; mode "tune" needs them to see the dataflow.
        mode: "eval": normalize with the running statistics. "tune": the same function and
            gradients, computed by the weight before (Jiang et al. 2023, arXiv 2305.11624), which
            saves the memory of the BatchNorm's activations.
        include, exclude: globs on the names of the normalizations; by default every BatchNorm.
        assume_example: in mode "tune", the model is called in no other way than in the example.
        inplace: change `model` itself.
        check: run the result once on the example inputs, beside the original.

    Raises:
        NormswapError: statistics that are NaN or negative, or a model without BatchNorm.

    Examples:
        >>> import torch
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> tuned = normswap.freeze(model, images[:2], mode="tune")
        >>> torch.allclose(tuned(images[:2]), model.eval()(images[:2]), atol=1e-4)
        True
    """
    model, inputs = opened(model, inputs)
    each = Freeze(mode, include=include, exclude=exclude, assume_example=assume_example)
    return carry_out(model, each, inputs=inputs, inplace=inplace, check=check)[0]


@usual_settings()
def unfreeze(
    model: nn.Module,
    *,
    include: Globs | None = None,
    exclude: Globs = (),
    inplace: bool = False,
) -> nn.Module:
    """Undo `freeze`: the BatchNorms train again, with the values their parameters have now.

    Args:
        include, exclude: globs on the names of frozen normalizations; by default all of them.
    """
    return carry_out(model, Unfreeze(include=include, exclude=exclude), inplace=inplace)[0]


@usual_settings()
def parametrize(
    model: nn.Module,
    method: str,
    *,
    inputs: Inputs | None = None,
    include: Globs | None = None,
    exclude: Globs = (),
    inplace: bool = False,
    check: bool = True,
    **options: Any,
) -> nn.Module:
    """Let `method` compute the weights of convolutions and Linears (torch's parametrizations).

    Args:
        inputs: example inputs, for a method that depends on the size of what a convolution sees.
        include, exclude: globs on the names of those modules; by default all of them.
        check: run the result once on the example inputs, beside the original.
        options: Options of the method; see `normswap.methods()[method].options`.

    Returns:
        The same function, to rounding, where the method can keep it (`methods()[method].keeps`).

    Raises:
        NormswapError: an unknown method or option, or no module is selected.
    """
    each = Parametrize(method, include=include, exclude=exclude, **options)
    return carry_out(model, each, inputs=inputs, inplace=inplace, check=check)[0]


@usual_settings()
def center(
    model: nn.Module,
    inputs: Inputs,
    *,
    include: Globs | None = None,
    exclude: Globs = (),
    trainable: bool = False,
    assume_example: bool = False,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Turn LayerNorms into RMSNorms, exactly, by moving the mean subtraction into earlier weights.

    Args:
        inputs: example inputs, which show the dataflow.
        include, exclude: globs on the names of the normalizations; by default every LayerNorm.
        trainable: keep it exact while the model trains: the weights are parametrized and centered
            whenever they are used. By default they are centered once.
        assume_example: the model is called in no other way than in the example.
        inplace: change `model` itself.
        check: run the result once on the example inputs, beside the original.

    Returns:
        The same function, to rounding. What stays a LayerNorm:
        `plan(model, Center(), inputs=inputs)` says why.

    Raises:
        NormswapError: a model without LayerNorm.

    Source: Jiang et al. 2023 (arXiv 2305.14858).
    """
    each = Center(
        include=include, exclude=exclude, trainable=trainable, assume_example=assume_example
    )
    result, decided = carry_out(model, each, inputs=inputs, inplace=inplace, check=check)
    warn_of_missed("center", decided)
    return result


@usual_settings()
def fold_gains(
    model: nn.Module | ExportedProgram,
    inputs: Inputs,
    *,
    include: Globs | None = None,
    exclude: Globs = (),
    assume_example: bool = False,
    untie: bool = False,
    remove_redundant: bool = False,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Fold gains and biases of normalizations into the layers after them, exactly.

    Args:
        inputs: example inputs, which show the dataflow.
        include, exclude: globs on the names of the normalizations; by default every LayerNorm,
            RMSNorm, GroupNorm and InstanceNorm.
        assume_example: the model is called in no other way than in the example.
        untie: fold a gain into a weight that another module shares, too, as a head that is tied to
            the embedding; each has its own then. Transformers ties them again when it loads the
            model, unless `model.config.tie_word_embeddings` is set to False before it is saved.
        remove_redundant: remove an RMSNorm, too, where all that reads it is normalized again and
            its gain has moved. That is exact up to eps: the plan says how far the outputs move on
            the example, and the RMSNorm stays where that is more than 1e-3 of their largest value.
            Its gain leaves the state dict; a model of the class that is loaded without it starts
            with a gain of 1, and computes the same up to eps.
        inplace: change `model` itself, in the memory of its weights: what shares that changes too.
        check: run the result once on the example inputs, beside the original.

    Returns:
        The same function, to rounding. The gains are 1 and the biases 0; the parameters stay, so
        that the state dict has the keys that it had. A bias that a layer has no place for stays,
        divided by the gain. What keeps its own:
        `plan(model, FoldAffine(), inputs=inputs)` says why.

    Raises:
        NormswapError: a model without such a normalization.

    Source: Ashkboos et al. 2024 (arXiv 2401.15024, section 3).
    """
    model, inputs = opened(model, inputs)
    each = FoldAffine(
        include=include,
        exclude=exclude,
        assume_example=assume_example,
        untie=untie,
        remove_redundant=remove_redundant,
    )
    result, decided = carry_out(model, each, inputs=inputs, inplace=inplace, check=check)
    warn_of_missed("fold_gains", decided)
    return result


@usual_settings()
def bake(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    include: Globs | None = None,
    exclude: Globs = (),
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Replace every parametrized tensor by its value; no parametrization is left.

    Args:
        inputs: example inputs to run the result on, beside the model; without any the result is
            not checked.
        include, exclude: globs on the names of the modules that hold them; by default all of them.
            A frozen BatchNorm that is excluded stays in tune mode.
        inplace: change `model` itself.
        check: run the result once on the example inputs, beside the original.
    """
    each = Bake(include=include, exclude=exclude)
    return carry_out(model, each, inputs=inputs, inplace=inplace, check=check)[0]
