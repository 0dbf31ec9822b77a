"""How a model came to be: where it is built from, and every edit carried out on it since.

The recipe travels with the model as the attribute `_normswap_recipe` (a deep copy keeps it), and
goes into saved weights and exported files.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast
from torch import nn

from normswap import __version__
from normswap.core.interrupts import at_last
from normswap.passes.edits import Edit

_ATTRIBUTE = "_normswap_recipe"


class Skipped(BaseModel):
    """A site that is left alone, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    reason: str

    def __str__(self) -> str:
        return "left"


# Of a million that are wrong, the first is told.
Edits = Annotated[tuple[Edit, ...], FailFast()]


class Recipe(BaseModel):
    """What rebuilds a converted model, weights aside.

    Attributes:
        normswap: the version that wrote it.
        source: the model reference it was built from; None for a model made in Python.
        weights: where those of the model came from, "random" for fresh ones; "" where its source
            knows.
        structure: the model as the source builds it: module path -> class, tensor name -> shape.
        passes: what was asked for, in order.
        edits: what was done, in order.
        left: the sites that the last pass left as they are, with the reasons.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    normswap: str = __version__
    source: str | None = None
    weights: str = ""
    structure: dict[str, str]
    passes: tuple[str, ...] = ()
    edits: Edits = ()
    left: Annotated[tuple[Skipped, ...], FailFast()] = ()

    def then(
        self, passes: Iterable[str], edits: Iterable[Edit], left: Iterable[Skipped] = ()
    ) -> "Recipe":
        """This recipe, continued."""
        return self.model_copy(
            update={
                "passes": (*self.passes, *passes),
                "edits": (*self.edits, *edits),
                "left": tuple(left),
            }
        )


def structure_of(model: nn.Module) -> dict[str, str]:
    """The classes of the modules and the shapes of the tensors: what tells architectures apart."""
    modules = {path or "(model)": type(module).__name__ for path, module in model.named_modules()}
    tensors = {
        name: "x".join(map(str, tensor.shape)) or "scalar"
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    return modules | tensors


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe that `model` carries, or a new one if nothing was done to it yet."""
    recipe = vars(model).get(_ATTRIBUTE)
    return recipe if isinstance(recipe, Recipe) else Recipe(structure=structure_of(model))


def remember(model: nn.Module, recipe: Recipe) -> None:
    """Let `model` carry `recipe`."""
    vars(model)[_ATTRIBUTE] = recipe


@contextmanager
def recipe_kept(model: nn.Module) -> Iterator[None]:
    """Whatever is done to `model` inside, and undone, it ends with the recipe it began with."""
    before = vars(model).get(_ATTRIBUTE)

    def restore() -> None:
        vars(model).pop(_ATTRIBUTE, None)
        if before is not None:
            vars(model)[_ATTRIBUTE] = before

    with at_last(restore):
        yield


def set_source(model: nn.Module, source: str) -> None:
    """Note that `model` is built from the reference `source`."""
    remember(model, recipe_of(model).model_copy(update={"source": source}))


def set_weights(model: nn.Module, weights: str) -> None:
    """Note where the weights of `model` are from."""
    remember(model, recipe_of(model).model_copy(update={"weights": weights}))
