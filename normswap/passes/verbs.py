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
from normswap.core.errors import NormswapError, warn
from normswap.graph.copies import copied
from normswap.graph.snapshot import all_or_nothing
from normswap.graph.supported import check_supported
from normswap.passes.absorb_input import AbsorbInput
from normswap.passes.bake import Bake
from normswap.passes.center import Center
from normswap.passes.fold import Fold
from normswap.passes.freeze import Freeze, Mode, Unfreeze
from normswap.passes.parametrize import Parametrize
from normswap.passes.plan import Plan, Skipped, carry_out
from normswap.passes.replacement import replacement
from normswap.passes.selection import Globs, was_asked_for
from normswap.source.program import opened


@usual_settings()
def convert(
    model: nn.Module | ExportedProgram,
    to: str,
    *,
    inputs: Any = None,
    data: Any = None,
    include: Globs | None = None,
    exclude: Globs = (),
    inplace: bool = False,
    check: bool = True,
    **options: Any,
) -> nn.Module:
    """Replace normalizations by the method `to`, and with `data` calibrate the new ones.

    Args:
        inputs: example inputs (a tensor, a tuple of positional ones, a dict of keyword ones, or a
            list of several such examples); by default the first batch of `data`.
        data: batches on which the new gains and biases are fitted to the original's outputs, and
            the number of groups of each site is chosen where it is not given.
        include, exclude: globs on the names of the normalizations; by default every BatchNorm.
        inplace: change `model` itself.
        check: run the result once on the example inputs, beside the original.
        options: Options of the method; see `normswap.methods()[to].options`.

    Returns:
        The converted model, in the mode the original is in.

    Raises:
        NormswapError: if the method is unknown, an option is not accepted, a layer would have only
            one value to normalize, or nothing can be replaced.
    """
    model, inputs = opened(model, inputs)
    replace = replacement(to, include=include, exclude=exclude, **options)
    if data is None:
        result, decided = carry_out(model, replace, inputs=inputs, inplace=inplace, check=check)
        check_replaced(decided)
        _warn(f"convert to {to}", decided)
        return result
    check_supported(model, numbers=True)
    # fit stands after passes in the flow of data; only this verb, which joins the two, looks ahead.
    from normswap.fit.calibrate import calibrate, replaced_norms
    from normswap.fit.conversion import decide, first_inputs
    from normswap.fit.reading import repeatable

    data = repeatable(data)
    inputs = first_inputs(model, data) if inputs is None else inputs
    with all_or_nothing(model):
        owned, replace = decide(model, replace, inputs, data)
        model = owned.apply(model, inplace=inplace, check=check) if owned.edits else model
        exact = replace.method.keeps == "exact"  # it leaves nothing to fit
        teacher = copied(model) if inplace and not exact else model
        student, decided = carry_out(model, replace, inputs=inputs, inplace=inplace, check=check)
        check_replaced(owned + decided)
        _warn(f"convert to {to}", decided)
        fits = not exact and replaced_norms(student, teacher)
        return calibrate(student, teacher, data) if fits else student


def check_replaced(decided: Plan) -> None:
    """Raise where a plan replaces nothing.

    Raises:
        NormswapError: it has no edits; the message says why for one of the sites.
    """
    if decided.edits:
        return
    first = next(iter(_missed(decided) or decided.left), None)
    why = f": {first.site or 'the model'}: {first.reason}" if first else ""
    raise NormswapError(f"nothing was replaced{why}; the plan of a dry run has every reason")


def _missed(decided: Plan) -> list[Skipped]:
    """The sites that the plan was asked to change, and leaves."""
    return [each for each in decided.left if was_asked_for(each.reason)]


def _warn(what: str, decided: Plan) -> None:
    missed = _missed(decided)
    if missed:
        first = f"{missed[0].site or 'the model'}: {missed[0].reason}"
        some = "1 normalization was" if len(missed) == 1 else f"{len(missed)} normalizations were"
        warn(
            f"{what}: {some} left, for example {first}; plan_of(result).left has all reasons",
            stacklevel=4,
        )


@usual_settings()
def fold(
    model: nn.Module | ExportedProgram,
    inputs: Any,
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
    _warn("fold", decided)
    return result


@usual_settings()
def absorb_input(
    model: nn.Module,
    inputs: Any,
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
    inputs: Any = None,
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
    inputs: Any = None,
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
    inputs: Any,
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
    _warn("center", decided)
    return result


@usual_settings()
def bake(
    model: nn.Module,
    inputs: Any = None,
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
