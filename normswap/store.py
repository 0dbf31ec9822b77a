"""Save a converted model, and build it again: its source, its recipe, then its weights.

A folder holds `model.safetensors`, whose metadata carry the recipe, and `recipe.json`, the same for
people to read. Nothing is pickled, and what the recipe names is not run unless it is one of
normswap's own sources: a folder from elsewhere must not choose the code that opens it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from normswap import source as sources
from normswap.core.ambient import usual_settings
from normswap.core.atomic import of_one_file, staged
from normswap.core.calls import check_module
from normswap.core.errors import NormswapError, first_line
from normswap.core.memory import Allowance, Counted, limited
from normswap.core.paths import check_reachable
from normswap.core.shown import LONGEST_NAME, shell_line, shown
from normswap.graph.copies import copied
from normswap.graph.snapshot import all_or_nothing
from normswap.passes.edits import TakeRawInput
from normswap.passes.plan import carry_out_edits
from normswap.passes.recipe import Recipe, recipe_of, remember, structure_of
from normswap.source import Source
from normswap.source.preprocessing import Preprocessing

WEIGHTS, RECIPE = "model.safetensors", "recipe.json"
_KEY = "normswap.recipe"
# Sources whose code comes with an installed library, whatever the name after the colon.
OWN_SOURCES = ("demo:", "torchvision:", "timm:")
_RAW = "the model takes raw pixels, as absorb-input left it"


def save(model: nn.Module, directory: str | Path) -> None:
    """Write `model` to `directory`; an interrupted save leaves what was there before.

    Raises:
        NormswapError: the folder cannot be written, or `model` is no module.

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> from tempfile import mkdtemp
        >>> folder = f"{mkdtemp()}/folded"
        >>> normswap.save(normswap.fold(model, images[:2]), folder)
        >>> again = normswap.load(folder, source="demo:digits")
    """
    check_module(model)
    with staged(Path(directory)) as scratch:
        write(model, scratch)


def write(model: nn.Module, directory: Path) -> None:
    """The two files of `save`, straight into a folder that the caller keeps whole."""
    recipe = recipe_of(model)
    try:
        recipe.model_dump_json()
    except PydanticSerializationError as error:  # a lone surrogate, for which UTF-8 has no form
        raise NormswapError(
            f"a name in the model, or of its source, is no Unicode text ({first_line(error)}); "
            "rename it"
        ) from error
    (directory / RECIPE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    save_model(model, str(directory / WEIGHTS), {_KEY: recipe.model_dump_json(), "format": "pt"})


@usual_settings()
def load(
    directory: str | Path,
    *,
    source: str | nn.Module | Callable[[], nn.Module] | None = None,
    memory_limit: int | str | None = None,
) -> nn.Module:
    """Build the model that `save` wrote to `directory`.

    Args:
        source: what to build the unconverted model from: a model reference, a function that
            returns it, or the unconverted model itself, which is copied. By default the source the
            recipe names, if it is one of normswap's own (demo, torchvision, timm); code of others
            runs only when it is named here.
        memory_limit: how much memory the recipe may ask for, in bytes or as "8GiB"; by default 16
            times what the weights take up on the disk, and at least 1 GiB.

    Raises:
        NormswapError: the folder is damaged, its source is not to be run unasked, the source
            builds another architecture now than the one that was saved, or the recipe asks for
            more memory than the limit.
    """
    with limited(memory_limit):
        return open_source(Path(directory), source=source).model


def resolve(
    reference: str,
    *,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    pretrained: bool = False,
    input_shapes: Sequence[str] = (),
    source: str | None = None,
) -> Source:
    """As `normswap.source.resolve`, and folders that `save` wrote.

    `source` is what the model of such a folder is built from, where that is code of the user's own.

    Raises:
        NormswapError: nothing is of this name, it cannot be built, or `checkpoint` does not fit.
    """
    check_reachable(reference)
    if source is not None and not Path(reference).is_dir():
        raise NormswapError(
            f"{reference!r} names its own code; a source is for a folder that normswap saved"
        )
    return sources.resolve(
        reference,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        pretrained=pretrained,
        input_shapes=input_shapes,
        folder=partial(open_source, source=source),
    )


def open_source(
    directory: Path, *, source: str | nn.Module | Callable[[], nn.Module] | None = None
) -> Source:
    """As `load`, with example inputs where the source has some, and how it takes images."""
    path = directory / WEIGHTS
    # The recipe and the weights by one handle: another process may replace the file.
    with _opened(path) as (recipe, file, allowance):
        # What the user names may be of any size.
        with nullcontext() if source is not None else Counted(allowance, "the model of its source"):
            built = _build(recipe, directory, source)
        model = built.model
        _check_structure(model, recipe, directory)
        with all_or_nothing(model), Counted(allowance, "what its recipe does"):
            _carry_out(recipe, model, path)
            _load_weights(model, file, path)
            remember(model, recipe)
    images = built.images
    if any(isinstance(edit, TakeRawInput) for edit in recipe.edits):
        images = replace(images or Preprocessing(), mean=(0.0,), std=(1 / 255,), origin=_RAW)
    return replace(
        built, reference=str(directory), weights=recipe.weights, images=images, renamed=""
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Recipe, Any, Allowance]]:
    try:
        file, allowance = of_one_file(path, _open)
        metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise NormswapError(
            f"{str(path)!r} is damaged ({first_line(error)}); save the model again"
        ) from error
    if _KEY not in metadata:
        raise NormswapError(
            f"{str(path)!r} holds no recipe; for bare weights name the model's source and give "
            "this file as the checkpoint"
        )
    allowance.check_json(len(metadata[_KEY]), "its recipe")
    try:
        recipe = Recipe.model_validate_json(metadata[_KEY])
    except ValidationError as error:
        raise NormswapError(
            f"the recipe in {str(path)!r} cannot be read ({error.error_count()} errors); "
            "it was written by another version of normswap, or changed"
        ) from error
    with file:
        yield recipe, file, allowance


def _open(path: Path) -> tuple[Any, Allowance]:
    if not path.is_file():
        raise NormswapError(f"there is no {str(path)!r}; name a folder that normswap saved")
    return safe_open(path, framework="pt"), Allowance.of_file(path)


def _carry_out(recipe: Recipe, model: nn.Module, path: Path) -> None:
    try:
        carry_out_edits(model, recipe.edits, check_numbers=False)
    except NormswapError:
        raise
    except Exception as error:  # of torch or Python: what a recipe asks for may be anything
        raise NormswapError(
            f"the recipe in {str(path)!r} cannot be carried out on this model "
            f"({type(error).__name__}: {first_line(error)}); save the model again"
        ) from error


def _build(
    recipe: Recipe, directory: Path, source: str | nn.Module | Callable[[], nn.Module] | None
) -> Source:
    if isinstance(source, nn.Module):
        return Source(str(directory), copied(source), None)
    if callable(source):
        return Source(str(directory), source(), None)
    reference = source if source is not None else recipe.source
    if reference is None:
        raise NormswapError(
            f"{str(directory)!r} does not say what its model is built from; name the source, as in "
            "load(directory, source='file.py:factory')"
        )
    if source is None and not reference.startswith(OWN_SOURCES):
        named, quoted = shown(reference, LONGEST_NAME), shell_line([reference])
        # What is cut is no longer what its quotes said, and must not be copied into a shell.
        whole = named == reference and len(quoted) <= LONGEST_NAME
        option = f" (--source {quoted})" if whole else ""
        raise NormswapError(
            f"{shown(directory, LONGEST_NAME)!r} was built from {named!r}; code named in a folder "
            f"is not run automatically. If you trust it, name it as the source{option}"
        )
    return resolve(reference)


def _check_structure(model: nn.Module, recipe: Recipe, directory: Path) -> None:
    now = structure_of(model)
    for name in (*recipe.structure, *now):
        saved, built = recipe.structure.get(name, "nothing"), now.get(name, "nothing")
        if saved != built:
            raise NormswapError(
                f"the source of {str(directory)!r} builds another model now: {name} was {saved}, "
                f"is {built}; build it with the code it was saved from"
            )


def _load_weights(model: nn.Module, file: Any, path: Path) -> None:
    try:
        saved: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = model.state_dict(keep_vars=True)
        # Names that share a tensor are saved once.
        shared = {_storage(own[name]) for name in saved if name in own}
        missing = [n for n, t in own.items() if n not in saved and _storage(t) not in shared]
        unexpected = [name for name in saved if name not in own]
        if missing or unexpected:
            raise RuntimeError(f"{(missing or unexpected)[0]} is {'missing' if missing else 'new'}")
        for name, tensor in saved.items():
            # A model may have been saved in another precision than its source builds.
            if tensor.is_floating_point():
                own[name].data = own[name].data.to(tensor.dtype)
        model.load_state_dict(saved, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise NormswapError(
            f"the weights in {str(path)!r} do not fit its recipe ({first_line(error)}); "
            "save the model again"
        ) from error


def _storage(tensor: Tensor) -> int:
    # What holds nothing shares nothing.
    return tensor.untyped_storage().data_ptr() or id(tensor)
