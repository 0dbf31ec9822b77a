"""The verbs that join rooms: what is rewritten by what data say.

`convert` replaces normalizations, and with data fits the new ones. `rescale` measures ranges on
data, and `rotate` can take its matrix from them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError
from normswap.core.types import Batches, Inputs
from normswap.fit.calibrate import calibrate, replaced_norms
from normswap.fit.groups import group_errors
from normswap.fit.principal import principal_components
from normswap.fit.ranges import ranges_on, shapes_in
from normswap.fit.reading import first_inputs, repeatable
from normswap.graph.capture import capture, captures_kept
from normswap.graph.copies import copied
from normswap.graph.snapshot import all_or_nothing
from normswap.graph.supported import check_supported
from normswap.passes.edits import RotateStream
from normswap.passes.equalize import Equalize
from normswap.passes.modularize import Modularize
from normswap.passes.plan import Plan, carry_out, plan
from normswap.passes.replace import Replace, Replacement, replacement
from normswap.passes.rescale import Limit, Rescale
from normswap.passes.rotate import Rotate
from normswap.passes.selection import Globs
from normswap.passes.verbs import missed, warn_of_missed
from normswap.source.program import opened


@usual_settings()
def convert(
    model: nn.Module | ExportedProgram,
    to: str,
    *,
    inputs: Inputs | None = None,
    data: Batches | None = None,
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

    Examples:
        >>> import torch
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> converted = normswap.convert(model, "group_norm", data=images[:200].split(50), groups=4)
        >>> any(isinstance(each, torch.nn.BatchNorm2d) for each in converted.modules())
        False
    """
    model, inputs = opened(model, inputs)
    replace = replacement(to, include=include, exclude=exclude, **options)
    if data is None:
        swap = swapped(model, replace, inputs, inplace=inplace, check=check)
        warn_of_missed(f"convert to {to}", swap.plan)
        return swap.student
    check_supported(model, numbers=True)
    data = repeatable(data)
    inputs = first_inputs(model, data) if inputs is None else inputs
    with all_or_nothing(model):
        swap = swapped(model, replace, inputs, data, inplace=inplace, check=check)
        warn_of_missed(f"convert to {to}", swap.plan)
        return calibrate(swap.student, swap.teacher, data) if swap.fits else swap.student


@dataclass(frozen=True)
class Swap:
    """A replacement that was carried out, before anything is fitted.

    Attributes:
        student: the model with the new normalizations.
        teacher: what it is fitted to: the original, its functional normalizations modules.
        plan: what was done.
        fits: whether the new normalizations have something to fit.
    """

    student: nn.Module
    teacher: nn.Module
    plan: Plan
    fits: bool


def swapped(
    model: nn.Module,
    replace: Replacement,
    inputs: Any,
    data: Iterable[Any] | None = None,
    *,
    inplace: bool = False,
    check: bool = True,
) -> Swap:
    """Carry out a replacement; `data` choose the numbers of groups that were left open.

    Args:
        data: batches that can be read more than once.

    Raises:
        NormswapError: nothing can be replaced; the message says why for one of the sites.
    """
    modularized = Plan()
    if data is not None:
        modularized, replace = decide(model, replace, inputs, data)
        if modularized.edits:
            model = modularized.apply(model, inplace=inplace, check=check)
    exact = replace.method.keeps == "exact"  # it leaves nothing to fit but statistics
    measures = isinstance(replace, Replace) and replace.estimates and replace.method.needs_running
    fits = data is not None and (measures or not exact)
    teacher = copied(model) if inplace and fits else model
    student, decided = carry_out(model, replace, inputs=inputs, inplace=inplace, check=check)
    whole = modularized + decided
    if not whole.edits:
        first = next(iter(missed(whole) or whole.left), None)
        why = f": {first.site or 'the model'}: {first.reason}" if first else ""
        raise NormswapError(f"nothing was replaced{why}; the plan of a dry run has every reason")
    return Swap(student, teacher, whole, fits and bool(replaced_norms(student, teacher)))


def decide(
    model: nn.Module, replace: Replacement, inputs: Any, data: Iterable[Any]
) -> tuple[Plan, Replacement]:
    """What gives `model` modules to compare, and the replacement to carry out on that.

    The plan gives functional normalizations a module; what it makes is the teacher. It has no
    edits where there are none. In the replacement every site has the number of groups that
    reproduces it best.

    Args:
        inputs: example inputs; None takes the first batch of `data`.
        data: batches that can be read more than once.

    Raises:
        NormswapError: `data` is empty, or the replacement is refused.
    """
    inputs = first_inputs(model, data) if inputs is None else inputs
    modularized = Plan()
    if isinstance(replace, Replace):
        each = Modularize(include=replace.include, exclude=replace.exclude)
        edits = plan(model, each, inputs=inputs).edits
        if edits:
            modularized = Plan(passes=(str(each),), edits=edits).on(inputs)
            model = modularized.apply(model)
        replace = replace.estimating()
        if replace.leaves_groups_open:
            candidates = replace.group_candidates(model, inputs)
            replace = replace.with_groups(group_errors(model, candidates, data))
    return modularized, replace


@usual_settings()
def rotate(
    model: nn.Module | ExportedProgram,
    inputs: Inputs,
    *,
    with_: Literal["hadamard", "random", "pca"] | Mapping[str, Tensor] = "hadamard",
    data: Batches | None = None,
    heads: bool = False,
    seed: int = 0,
    include: Globs | None = None,
    exclude: Globs = (),
    assume_example: bool = False,
    untie: bool = False,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Rotate the streams that LayerNorms and RMSNorms normalize, by an orthogonal matrix, exactly.

    Args:
        inputs: example inputs, which show the dataflow.
        with_: "hadamard" spreads what is far out over all channels; "random" is uniform over all
            matrices; "pca" takes the principal components of `data`. Or for each stream a matrix
            of your own, (C, C), by the name of a normalization on it.
        data: batches to measure the components on.
        heads: rotate the values of each attention, too, all heads by one Hadamard or random matrix.
        seed: of the random signs, or numbers.
        include, exclude: globs on the names of the normalizations; by default every LayerNorm and
            RMSNorm. A stream is rotated where all normalizations on it are selected.
        assume_example: the model is called in no other way than in the example.
        untie: fold a gain into a weight that another module shares, too, as a head that is tied to
            the embedding; each has its own then (see `fold_gains`).
        inplace: change `model` itself, in the memory of its weights: what shares that changes too.
        check: run the result once on the example inputs, beside the original.

    Returns:
        The same function, to rounding, of the same class and with the keys that the state dict
        had. What is not rotated: `plan(model, Rotate(), inputs=inputs)` says why.

    Raises:
        NormswapError: a model without LayerNorm or RMSNorm, or "pca" without data.

    Source: Ashkboos et al. 2024 (arXiv 2404.00456), Liu et al. 2024 (arXiv 2405.16406).
    """
    model, inputs = opened(model, inputs)
    each = rotation(
        model,
        inputs,
        with_=with_,
        data=data,
        heads=heads,
        seed=seed,
        include=include,
        exclude=exclude,
        assume_example=assume_example,
        untie=untie,
    )
    result, decided = carry_out(model, each, inputs=inputs, inplace=inplace, check=check)
    warn_of_missed("rotate", decided)
    return result


def rotation(
    model: nn.Module,
    inputs: Any,
    *,
    with_: str | Mapping[str, Tensor],
    data: Any,
    **options: Any,
) -> Rotate:
    """The pass that rotates; of "pca" with the components of `data`.

    Raises:
        NormswapError: "pca" without data, or data without "pca".
    """
    if (with_ == "pca") != (data is not None):
        raise NormswapError(
            "principal components, pca, are measured on data, and nothing else is; give both or "
            "neither"
        )
    if with_ != "pca":
        return Rotate(with_, **options)  # type: ignore[arg-type]
    decided = plan(model, Rotate("random", **options), inputs=inputs)
    streams = [edit for edit in decided.edits if isinstance(edit, RotateStream)]
    return Rotate(principal_components(model, streams, data), **options)


@usual_settings()
def rescale(
    model: nn.Module | ExportedProgram,
    inputs: Inputs,
    data: Batches | None = None,
    *,
    limit: Limit | float = "float16",
    margin: float = 2.0,
    per: Literal["tensor", "channel"] = "tensor",
    include: Globs | None = None,
    exclude: Globs = (),
    assume_example: bool = False,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Bring every activation into the range of a type, exactly, by powers of two in the weights.

    Args:
        inputs: example inputs, which show the dataflow; None takes those of `data` alone.
        data: batches on which the ranges are measured; per channel none are needed.
        limit: "float16": no activation reaches 65,504; "square": what a normalization takes stays
            below the root of that, for a runtime that squares it in float16; or a number.
        margin: how many times further than on the data an activation may reach.
        per: "tensor": one number for a whole tensor, as above. "channel": one for each channel, by
            which the weights of neighbouring layers get the same ranges, before a quantizer (Nagel
            et al. 2019, arXiv 1906.04721); fold BatchNorms first.
        include, exclude: globs on the names of the modules that compute what reaches too far, or
            per channel of any layers; by default all.
        assume_example: the model is called in no other way than in the example and the data.
        inplace: change `model` itself, in the memory of its weights: what shares that changes too.
        check: run the result once on the example inputs, beside the original.

    Returns:
        The same function, to the bit in float32: weights, biases and eps of normalizations are
        multiplied by powers of two. What reaches too far and cannot be scaled (a GELU, a softmax or
        the output takes it) stays: `plan_of(result).left` names it, and a warning says so.

    Raises:
        NormswapError: the data have no batch, or the model does not run on one.
    """
    model, inputs = opened(model, inputs)
    if per == "channel":
        both = Equalize(include=include, exclude=exclude, assume_example=assume_example)
        return carry_out(model, both, inputs=inputs, inplace=inplace, check=check)[0]
    if per != "tensor":
        raise NormswapError(f"ranges are scaled per 'tensor' or per 'channel', not {per!r}")
    if data is None:
        raise NormswapError("the ranges are measured on data; give some batches")
    data = repeatable(data)
    with captures_kept():
        examples, each = rescaling(
            model,
            inputs,
            data,
            limit=limit,
            margin=margin,
            include=include,
            exclude=exclude,
            assume_example=assume_example,
        )
        result, decided = carry_out(model, each, inputs=examples, inplace=inplace, check=check)
    warn_of_missed("rescale", decided)
    return result


def rescaling(
    model: nn.Module, inputs: Any, data: Iterable[Any], **options: Any
) -> tuple[list[Any], Rescale]:
    """The pass that rescales by the ranges on `data`, and the examples to plan it with.

    Raises:
        NormswapError: the data have no batch, or the model does not run on one.
    """
    check_supported(model, numbers=True)
    examples = shapes_in(model, inputs, data)
    return examples, Rescale(ranges_on(capture(model, examples), data), **options)
