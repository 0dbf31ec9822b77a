"""The verb that joins rooms: convert replaces normalizations, and with data fits the new ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError
from normswap.fit.calibrate import calibrate, replaced_norms
from normswap.fit.groups import choose_groups
from normswap.fit.reading import first_inputs, repeatable
from normswap.graph.copies import copied
from normswap.graph.snapshot import all_or_nothing
from normswap.graph.supported import check_supported
from normswap.passes.modularize import Modularize
from normswap.passes.plan import Plan, carry_out, plan
from normswap.passes.replace import Replace, Replacement, replacement
from normswap.passes.selection import Globs
from normswap.passes.verbs import missed, warn_of_missed
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
    exact = replace.method.keeps == "exact"  # it leaves nothing to fit
    fits = data is not None and not exact
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
        if replace.leaves_groups_open:
            candidates = replace.group_candidates(model, inputs)
            replace = replace.with_groups(choose_groups(model, candidates, data))
    return modularized, replace
