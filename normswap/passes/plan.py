"""A plan: what is going to be done to a model, and why, before anything is done.

    convert(model, to)  =  plan(model, Replace(to)).apply(model)

A plan is data. It prints as a table, goes to JSON and back, and rebuilds the architecture on
another machine (`normswap.store`).
"""

from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from normswap.ambient import usual_settings
from normswap.errors import NormswapError
from normswap.graph.copies import copied
from normswap.graph.snapshot import all_or_nothing
from normswap.graph.supported import check_supported
from normswap.passes.edits import Edit
from normswap.passes.edits.forward import rewriting_at_the_end
from normswap.passes.recipe import recipe_of, remember


class Left(BaseModel):
    """A site that is left alone, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    reason: str


class Plan(BaseModel):
    """Edits with their reasons, in the order in which they are carried out.

    Attributes:
        passes: what was asked for.
        edits: what will be done.
        left: the sites that stay as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    left: tuple[Left, ...] = ()

    @property
    def changed(self) -> tuple[str, ...]:
        """The sites that will change, in order."""
        return tuple(dict.fromkeys(edit.site for edit in self.edits))

    def to_json(self) -> str:
        """The plan as JSON; `Plan.from_json` reads it back."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan.

        Raises:
            NormswapError: `text` is not one.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the file"
            raise NormswapError(
                f"not a plan that this normswap can read: {where}: {problem['msg']}"
            ) from error

    @usual_settings()
    def apply(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Carry the plan out, all of it or nothing.

        Args:
            inplace: change `model` itself; otherwise a deep copy, and `model` stays as it is.

        Raises:
            NormswapError: an edit does not fit the model, which is then as before.
        """
        if not inplace:
            try:
                model = copied(model)
            except Exception as error:
                raise NormswapError(
                    f"the model cannot be copied ({error}); convert it with inplace=True"
                ) from error
        with all_or_nothing(model), rewriting_at_the_end():
            recipe = recipe_of(model)
            for edit in self.edits:
                edit.apply(model)
            remember(model, recipe.then(self.passes, self.edits))
        return model

    def __add__(self, other: "Plan") -> "Plan":
        """This plan, then `other`."""
        return Plan(
            passes=self.passes + other.passes,
            edits=self.edits + other.edits,
            left=self.left + other.left,
        )

    def __str__(self) -> str:
        from normswap.report.tables import plan_table, to_text

        return to_text(*plan_table(self))


class Pass(Protocol):
    """Something that can decide what to do with a model."""

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """What this pass would do to `model`, which stays as it is."""
        ...


@usual_settings()
def plan(model: nn.Module, *passes: Pass, inputs: Any = None) -> Plan:
    """Decide what `passes`, one after the other, would do to `model`; nothing is changed.

    Args:
        inputs: example inputs: a tensor, a tuple of positional ones, a dict of keyword ones.

    Raises:
        NormswapError: the model cannot be rewritten (scripted, quantized, lazy), or a pass refuses.
    """
    check_supported(model)
    total = Plan()
    for number, each in enumerate(passes):
        decided = each.plan(model, inputs)
        total += decided
        if number + 1 < len(passes):  # the next pass must see what this one makes
            model = decided.apply(model)
    return total
