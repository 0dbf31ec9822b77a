"""A replacement decided with data: the number of groups, where it was left open."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.core.errors import NormswapError
from normswap.fit.batch import inputs_for
from normswap.fit.groups import choose_groups
from normswap.fit.reading import Reading
from normswap.passes.modularize import Modularize
from normswap.passes.plan import Plan, plan
from normswap.passes.replace import Replace
from normswap.passes.replacement import Replacement


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
    owned = Plan()
    if isinstance(replace, Replace):
        each = Modularize(include=replace.include, exclude=replace.exclude)
        edits = plan(model, each, inputs=inputs).edits
        if edits:
            owned = Plan(passes=(str(each),), edits=edits).on(inputs)
            model = owned.apply(model)
        if replace.leaves_groups_open:
            candidates = replace.group_candidates(model, inputs)
            replace = replace.with_groups(choose_groups(model, candidates, data))
    return owned, replace


def first_inputs(model: nn.Module, data: Iterable[Any]) -> Any:
    """The first batch of `data`, as example inputs of `model`.

    Raises:
        NormswapError: there is none.
    """
    reading = Reading(data)
    for batch in reading:
        with reading.current():
            args, kwargs = inputs_for(model, batch)
        return kwargs or args
    raise NormswapError("the data hold no batch; give some that do")
