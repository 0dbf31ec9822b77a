"""A plan: what is going to be done to a model, and why, before anything is done.

    convert(model, to)  =  plan(model, Replace(to)).apply(model)

A plan is data. It prints as a table, goes to JSON and back, and rebuilds the architecture on
another machine (`normswap.store`).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from glob import escape
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, FailFast, PrivateAttr, ValidationError
from rich.console import RenderableType
from torch import nn

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError
from normswap.core.memory import Allowance, Counted, limited
from normswap.core.originals import overwriting
from normswap.core.results import Result
from normswap.core.terminal import site_name, site_tables, words
from normswap.core.types import Inputs
from normswap.graph.capture import capture, captures_kept, examples_of, forget_captures
from normswap.graph.copies import copied
from normswap.graph.fused_paths import replaced_norms_called
from normswap.graph.sites import find_sites
from normswap.graph.snapshot import all_or_nothing
from normswap.graph.supported import check_supported
from normswap.passes.check import Beside, Differs, agrees_in_float64
from normswap.passes.edits import Edit
from normswap.passes.edits.base import by_site
from normswap.passes.edits.modules import promised
from normswap.passes.edits.traced_forward import rewriting_at_the_end
from normswap.passes.recipe import Edits, Skipped, recipe_of, remember

_OF_LAYERS = ("AbsorbInput", "Bake", "Equalize", "Parametrize", "Rescale")  # their sites

__all__ = ["Pass", "Plan", "Skipped", "carry_out", "plan", "plan_of"]


class Plan(Result, BaseModel):
    """Edits with their reasons, in the order in which they are carried out.

    It iterates over the edits, and then over what is left; `plan["layer1.0.bn1"]` are those of a
    site.

    Attributes:
        passes: what was asked for.
        edits: what will be done.
        left: the sites that stay as they are.
        exact: the result computes the same function in eval mode, to rounding and `deviation`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: tuple[str, ...] = ()
    edits: Edits = ()
    left: Annotated[tuple[Skipped, ...], FailFast()] = ()
    exact: bool = True
    _examples: Any = PrivateAttr(None)
    _length: int = PrivateAttr(0)  # of the JSON that it was read from, by whoever wrote that
    _memory_limit: int | str | None = PrivateAttr(None)

    @property
    def deviation(self) -> float:
        """How far the edits move the outputs beyond rounding, relative to the largest value.

        It is 0 unless they remove a redundant normalization, which was measured on the examples.
        """
        return promised(self.edits)

    @property
    def checked(self) -> bool:
        """Whether `apply` has examples to run the result on, beside the model."""
        return self._examples is not None

    def __eq__(self, other: object) -> bool:
        # The examples are no part of what is decided.
        if not isinstance(other, Plan):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in Plan.model_fields)

    def __hash__(self) -> int:
        return hash((self.passes, self.edits, self.left, self.exact))

    def on(self, inputs: Any) -> "Plan":
        """This plan, to be checked on the example inputs that it was made with."""
        held = self.model_copy()
        held._examples = inputs
        return held

    @property
    def changed(self) -> tuple[str, ...]:
        """The sites that will change, in order."""
        return tuple(dict.fromkeys(edit.site for edit in self.edits))

    def to_json(self) -> str:
        """The plan as JSON; `Plan.from_json` reads it back."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str, *, memory_limit: int | str | None = None) -> "Plan":
        """Read a plan.

        Args:
            memory_limit: how much memory the plan may ask for, when it is read and when it is
                applied, in bytes or as "8GiB"; by default 16 times what the text and the model
                take up, and at least 1 GiB.

        Raises:
            NormswapError: `text` is not one, or asks for more memory than the limit.
        """
        with limited(memory_limit):
            Allowance.of("the plan", len(text)).check_json(len(text), "its JSON")
        try:
            read = cls.model_validate_json(text)
            read._length, read._memory_limit = len(text), memory_limit
            return read
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the file"
            raise NormswapError(
                f"not a plan that this normswap can read: {where}: {problem['msg']}"
            ) from error

    @usual_settings()
    def apply(
        self, model: nn.Module, *, inplace: bool = False, inputs: Any = None, check: bool = True
    ) -> nn.Module:
        """Carry the plan out, all of it or nothing.

        Args:
            inplace: change `model` itself; otherwise a deep copy, and `model` stays as it is.
            inputs: example inputs to run the result on, beside the model, in eval mode; by default
                those that the plan was made with. Without any the result is not checked.
            check: whether to run it; that costs a forward of each with gradients and one without.

        Raises:
            NormswapError: an edit does not fit the model, or the result does not compute what the
                plan promises. The model is then as before.
        """
        examples = examples_of(self._examples if inputs is None else inputs) if check else []
        if not self.edits or not examples:
            return self._applied(model, inplace, None)
        beside = Beside(model, self.edits, examples, exact=self.exact)
        try:
            return self._applied(model, inplace, beside)
        except Differs as fault:
            if not fault.may_be_rounding:
                raise
            same = agrees_in_float64(
                _copied(model), self._carry_out, self.edits, examples, exact=self.exact
            )
            if same is False or (same is None and fault.is_large):
                raise
        return self._applied(model, inplace, None)

    def _applied(self, model: nn.Module, inplace: bool, beside: Beside | None) -> nn.Module:
        if not inplace:
            model = _copied(model)
        overwrites = inplace and any(edit.overwrites for edit in self.edits)
        with all_or_nothing(model), overwriting() if overwrites else nullcontext():
            self._carry_out(model)
            if beside is not None:
                beside.check(model)
        return model

    def _carry_out(self, model: nn.Module) -> None:
        recipe = recipe_of(model)
        with rewriting_at_the_end(), self._counted(model):
            carry_out_edits(model, self.edits, check_numbers=True)
            remember(model, recipe.then(self.passes, self.edits, self.left))

    @contextmanager
    def _counted(self, model: nn.Module) -> Iterator[None]:
        """What a plan from elsewhere does takes memory in proportion to the model and its text."""
        if not self._length:
            yield
            return
        with limited(self._memory_limit):
            size = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
            allowance = Allowance.of("the plan", self._length + size)
        with Counted(allowance, "what it does"):
            yield

    def __add__(self, other: "Plan") -> "Plan":
        """This plan, then `other`."""
        both = Plan(
            passes=self.passes + other.passes,
            edits=self.edits + other.edits,
            left=self.left + other.left,
            exact=self.exact and other.exact,
        ).on(other._examples if self._examples is None else self._examples)
        both._length = self._length + other._length
        both._memory_limit = self._memory_limit or other._memory_limit
        return both

    def entries(self) -> tuple[Edit | Skipped, ...]:
        """The edits, and what is left."""
        return (*self.edits, *self.left)

    def find(self, name: str) -> tuple[Edit | Skipped, ...]:
        """The entries of a site.

        Raises:
            KeyError: there is none.
        """
        if found := tuple(each for each in self.entries() if each.site == name):
            return found
        raise KeyError(name)

    def summary(self) -> str:
        """How many of its sites it changes."""
        changed, skipped = len(self.changed), len(self.left)
        layers = self.passes and all(each.startswith(_OF_LAYERS) for each in self.passes)
        noun = "layer" if layers else "normalization"
        verb = " changes" if changed + skipped == 1 else "s change"
        count = f"{changed} of {changed + skipped} {noun}{verb}, {skipped or 'none'} skipped"
        if self.edits and not self.checked:
            count += "; unchecked: with example inputs the result is run beside the model"
        return count

    def tables(self, *, whole: bool = False) -> list[RenderableType]:
        """The summary; then for each site what will be done and why, or why it is left.

        Args:
            whole: list every site, however many there are.
        """
        rows = [(site_name(row[0]), *map(words, row[1:])) for row in by_site(self.edits)]
        rows += [(site_name(e.site), words("left", "yellow"), words(e.reason)) for e in self.left]
        return [words(self.summary()), *site_tables(("site", "what", "why"), rows, whole=whole)]


class Pass(Protocol):
    """Something that can decide what to do with a model."""

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """What this pass would do to `model`, which stays as it is."""
        ...


@usual_settings()
def plan(model: nn.Module, *passes: Pass, inputs: Inputs | None = None) -> Plan:
    """Decide what `passes`, one after the other, would do to `model`; nothing is changed.

    Args:
        inputs: example inputs: a tensor, a tuple of positional ones, a dict of keyword ones, or a
            list of several such examples. What is decided holds for all of them.

    Raises:
        NormswapError: the model cannot be rewritten (scripted, quantized, lazy), or a pass refuses.

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> plan = normswap.plan(model, normswap.Fold(), inputs=images[:2])
        >>> plan.left
        ()
        >>> folded = plan.apply(model)
    """
    check_supported(model)
    total = Plan()
    with captures_kept():
        for number, each in enumerate(passes):
            decided = each.plan(model, inputs)
            total += decided
            if decided.edits and number + 1 < len(passes):
                model = decided.apply(model)  # the next pass must see what this one makes
    return total.on(inputs)


def carry_out(
    model: nn.Module,
    each: Pass,
    *,
    inputs: Any = None,
    inplace: bool = False,
    check: bool = True,
) -> tuple[nn.Module, Plan]:
    """Plan one pass and apply it; the sites at which the result differs are left, with the reason.

    Returns:
        The result, and the plan that made it.

    Raises:
        NormswapError: as `plan` and `Plan.apply`; the result differs whatever is left.
    """
    with captures_kept():
        decided = plan(model, each, inputs=inputs)
        try:
            return decided.apply(model, inplace=inplace, check=check), decided
        except Differs as fault:
            decided = _Search(model, each, inputs, decided).without_faults(fault)
        return decided.apply(model, inplace=inplace), decided


def plan_of(model: nn.Module) -> Plan:
    """Every edit of `model` since it was built, and the sites that the last pass left.

    Empty for a model to which nothing was done.
    """
    recipe = recipe_of(model)
    return Plan(passes=recipe.passes, edits=recipe.edits, left=recipe.left)


def carry_out_edits(model: nn.Module, edits: Sequence[Edit], *, check_numbers: bool) -> None:
    """Apply `edits` to `model`, in place.

    Args:
        check_numbers: what was decided from numbers has to hold; a model that is only built again
            is given its numbers afterwards.
    """
    forget_captures(model)
    with replaced_norms_called(model):
        for edit in edits:
            if check_numbers:
                edit.check_numbers(model)
            edit.apply(model)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as error:
        raise NormswapError(
            f"the model cannot be copied ({error}); convert it with inplace=True"
        ) from error


class _Search:
    """Finds the sites at which a result differs from its original, by leaving some of them out."""

    _MOST_TRIALS = 40

    def __init__(self, model: nn.Module, each: Pass, inputs: Any, decided: Plan) -> None:
        self._model, self._each, self._inputs = model, each, inputs
        sites = {site.name for site in find_sites(capture(model, inputs))}
        # Of other names (a layer that is parametrized) the pass knows.
        changed = list(decided.changed)
        self._sites = [name for name in changed if name in sites] or changed
        self._trials = 0

    def without_faults(self, fault: Differs) -> Plan:
        """The plan of all other sites.

        Raises:
            Differs: it is the pass that cannot leave sites out, or the result of none agrees.
        """
        if not hasattr(self._each, "exclude"):
            raise fault
        suspects = [s for s in self._sites if any(_is_in(s, path) for path in fault.suspects)]
        rest = [site for site in self._sites if site not in suspects]
        if suspects and rest and self._fault(rest) is None:
            faulty = suspects if len(suspects) < 2 else self._faulty(suspects, rest)
        else:
            faulty = self._faulty(self._sites, [])
        kept = [site for site in self._sites if site not in faulty]
        while kept and (again := self._fault(kept)) is not None:
            near = [s for s in kept if any(_is_in(s, path) for path in again.suspects)]
            kept = [site for site in kept if site not in near] if near else []
        if not kept:
            raise fault
        decided = self._plan(kept)
        reason = f"left, as otherwise {fault}"
        left = [
            each
            if each.site in kept or each.site not in self._sites
            else Skipped(site=each.site, reason=reason)
            for each in decided.left
        ]
        return decided.model_copy(update={"left": tuple(left)}).on(self._inputs)

    def _faulty(self, sites: list[str], kept: list[str]) -> list[str]:
        """Those of `sites` that cannot be changed beside `kept`, which can."""
        if len(sites) == 1 or self._trials >= self._MOST_TRIALS:
            return sites
        half = len(sites) // 2
        found: list[str] = []
        for part in (sites[:half], sites[half:]):
            if self._fault([*kept, *part]) is not None:
                found += self._faulty(part, kept)
        return found or sites  # it takes both halves

    def _fault(self, sites: list[str]) -> Differs | None:
        """What differs where these sites are changed, and no others."""
        self._trials += 1
        try:
            self._plan(sites).apply(self._model)
        except Differs as fault:
            return fault
        except NormswapError as error:  # nothing is selected any more
            return Differs(str(error))
        return None

    def _plan(self, sites: list[str]) -> Plan:
        each: Any = copy.copy(self._each)
        given = (each.exclude,) if isinstance(each.exclude, str) else tuple(each.exclude)
        without = [escape(site) for site in self._sites if site not in sites]
        each.exclude = (*given, *without)
        return plan(self._model, each, inputs=self._inputs)


def _is_in(site: str, path: str) -> bool:
    """Whether a site is the module at `path`, or one that its forward calls."""
    return site == path or site.rpartition(".")[0] == path or path == ""
