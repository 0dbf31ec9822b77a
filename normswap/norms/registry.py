"""The registry of methods: what can be asked for by name, and how each is built.

A method is a function that builds it, and a few facts about it. What it builds depends on its kind:

- "activation": `build(num_features, *, eps, affine, **options) -> Module`, for inputs of any rank
  >= 2 with channels at axis 1; `convert` puts it in the place of a normalization.
- "weight": `build(module, name, **options) -> Module`, a parametrization of the tensor `name` of
  that module (torch's contract, `torch.nn.utils.parametrize`); `parametrize` registers it.
- "recurrent": `build(module, **options) -> Module`, from an `nn.RNN`, `nn.LSTM` or `nn.GRU` whose
  weights it takes over; `convert` puts it in its place.
- "input": `build(num_features, **options) -> Module`, a layer before the model, fitted to data.

Third parties register theirs through the entry-point group `normswap.methods`: each entry point
names a `Method`.

Our own register themselves, each in a file of its family's folder, when `normswap.norms` is
imported.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint
from inspect import Parameter, signature
from math import inf
from pkgutil import iter_modules
from threading import RLock
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from normswap.core.errors import NormswapError, told
from normswap.core.plugins import entries, used
from normswap.core.shown import LONGEST_NAME, shown

GROUP = "normswap.methods"  # of entry points
Keeps = Literal["exact", "near", "calibrated"]
MethodKind = Literal["activation", "weight", "recurrent", "input"]
MethodStatistics = Literal["batch", "batch and sample", "sample", "fixed", "weight", "none"]
_COMMON = ("num_features", "eps", "affine", "module", "name")
_LARGEST = {int: 2**31, float: 1e38}  # sizes that torch counts with, numbers in float32
# Where a method has such an option. Iterations repeat work in every forward; some five are usual.
_BOUNDS = {
    "eps": Field(ge=0),
    "momentum": Field(ge=0, le=1),
    "iterations": Field(le=1000),
    "n_power_iterations": Field(le=1000),
    "domains": Field(max_length=1000),  # each is a module
}
_VALUES = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Method:
    """A normalization that a model can be given.

    Attributes:
        name: as in `convert(model, name)`.
        build: makes the module; its arguments beyond num_features, eps and affine are the options.
        keeps: what survives a swap: "exact" the same function in eval mode, "near" a close one,
            "calibrated" another, fitted to data.
        summary: one line.
        source: the paper.
        kind: "activation", "weight", "recurrent" or "input": what it normalizes.
        formula: what it computes, in plain text.
        statistics: where those that it needs come from in training: the "batch", the "sample",
            both, the "weight"; "fixed" ones were taken before; "none".
        cost: what it does in training besides operations on small tensors, in passes over its
            input.
        onnx: why it has no ONNX form; empty where it has one.
        needs_running: takes over the running statistics of the site it replaces.
        folds_scale: in the place of a BatchNorm its scale goes into the weight before.
        values: (num_features, positions, options) -> how many values one statistic is taken over;
            None for a method whose statistics do not come from the sample.
        adopt: (new, old) -> None: give the new module what the old one holds under other names,
            after parameters and buffers of the same name and shape were carried over.
        swap: options that a swap gives, unless others are asked for, in place of the paper's.
        fixed: arguments of `build` that are no options, and have their defaults.
    """

    name: str
    build: Callable[..., nn.Module]
    keeps: Keeps = "calibrated"
    summary: str = ""
    source: str = ""
    kind: MethodKind = "activation"
    formula: str = ""
    statistics: MethodStatistics = "sample"
    cost: str = ""
    onnx: str = ""
    needs_running: bool = False
    folds_scale: bool = False
    values: Callable[[int, int, Mapping[str, Any]], int] | None = None
    adopt: Callable[[nn.Module, nn.Module], None] | None = None
    swap: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    @property
    def batch_independent(self) -> bool:
        """Whether in training the output for one sample is the same whatever the others are."""
        return "batch" not in self.statistics

    @property
    def options(self) -> tuple[str, ...]:
        """The options that `build` takes."""
        others = (*_COMMON, *self.fixed)
        return tuple(name for name in signature(self.build).parameters if name not in others)

    def made(self, *args: Any, **options: Any) -> nn.Module:
        """What `build` makes of this.

        Raises:
            NormswapError: it objects to it, or fails, or makes no module.
        """
        try:
            module = self.build(*args, **options)
        except NormswapError:
            raise
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise NormswapError(
                f"{self.name} cannot be made"
                f"{f' with {shown(given, LONGEST_NAME)}' if given else ''}: {told(error)}"
            ) from error
        if not isinstance(module, nn.Module):
            raise NormswapError(
                f"the method {self.name} is broken: it makes {type(module).__name__}, no module"
            )
        return module


_METHODS: dict[str, Method] = {}
_loading = False  # whether methods of installed packages are being imported,
_LOADING = RLock()  # which one thread does at a time, for sys.stdout changes meanwhile


def register(name: str, build: Callable[..., nn.Module], **facts: Any) -> Method:
    """Make a method known under `name`; the arguments are those of `Method`.

    Raises:
        NormswapError: the name is taken.
    """
    if name in _METHODS and not _is_from_another_import(_METHODS[name].build, build):
        raise NormswapError(f"a method named {name!r} is registered already; choose another name")
    _METHODS[name] = Method(name, build, **facts)
    return _METHODS[name]


def register_family(package: str, path: Iterable[str]) -> None:
    """Import the files of a folder of methods, by name, each of which registers its own."""
    for file in iter_modules(path):
        import_module(f"{package}.{file.name}")


def _is_from_another_import(old: Any, new: Any) -> bool:
    """Whether both are one definition: Ctrl-C may stop an import, which then begins anew."""
    old_name, name = (
        (getattr(build, "__module__", ""), getattr(build, "__qualname__", "<lambda>"))
        for build in (old, new)
    )
    return old is not new and old_name == name and "<" not in name[1]


def methods() -> dict[str, Method]:
    """Every known method by name, those of installed packages included."""
    global _loading
    with _LOADING:
        if _loading:  # a package asks that is being imported just now
            return dict(_METHODS)
        _loading = True
        try:
            return {**_METHODS, **_third_party()}
        finally:
            _loading = False


@cache
def _third_party() -> Mapping[str, Method]:
    """Those of installed packages; one that cannot be had is left out, with a warning."""
    found: dict[str, Method] = {}
    for entry in entries(GROUP):
        registered = dict(_METHODS)
        method = used(entry, "the method", lambda each: _checked(each, found))
        if method is None:  # and with it what it registered
            _METHODS.clear()
            _METHODS.update(registered)
        else:
            found[entry.name] = method
    return found


def _checked(entry: EntryPoint, found: Mapping[str, Method]) -> Method:
    """The method that `entry` names.

    Raises:
        NormswapError: it is none, or of another name, or one whose name is taken.
        BaseException: whatever the package raises when it is imported.
    """
    method = entry.load()
    if not isinstance(method, Method):
        raise NormswapError(f"{entry.value!r} is no normswap Method")
    if method.name != entry.name or not entry.name.isidentifier():
        raise NormswapError(
            f"{entry.value!r} calls itself {method.name!r}, which has to be the name of the entry "
            "point, of letters, digits and _"
        )
    if entry.name in found or _METHODS.get(entry.name, method) is not method:
        raise NormswapError("the name is taken")
    facts = {each.name: getattr(method, each.name) for each in fields(Method)}
    try:
        TypeAdapter(Method).validate_python(facts)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise NormswapError(f"its {wrong['loc'][0]} is wrong: {wrong['msg']}") from error
    signature(method.build)  # of which the options are read
    return method


# What papers call them.
_SHORT = {
    "bn": "batch_norm",
    "dyt": "dynamic_tanh",
    "frn": "filter_response_norm",
    "gn": "group_norm",
    "grn": "global_response_norm",
    "in": "instance_norm",
    "ln": "layer_norm",
    "lrn": "local_response_norm",
    "wn": "weight_norm",
    "ws": "weight_standardization",
}


def method_named(name: str) -> Method:
    """The method called `name`, in full or as papers shorten it: gn, ln, frn.

    Raises:
        NormswapError: there is none; the message suggests the nearest.
    """
    known = methods()
    if not isinstance(name, str):
        raise NormswapError(_no_name(name, known))
    name = name if name in known else _SHORT.get(name.lower(), name)
    if name not in known:
        near = get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise NormswapError(f"unknown method {name!r}; {hint}")
    return known[name]


def _no_name(given: Any, known: Mapping[str, Method]) -> str:
    """What to say of a class, or anything else, in the place of a method's name."""
    called = given.__name__ if isinstance(given, type) else type(given).__name__
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", re.sub(r"\dd$", "", called)).lower()
    near = get_close_matches(words, known, n=1, cutoff=0.7)
    hint = f"as in {near[0]!r}" if near else f"known: {', '.join(sorted(known))}"
    return f"a method is given by its name, not by {called}; {hint}"


def create(method: str, num_features: int, **options: Any) -> nn.Module:
    """A module of `method` for inputs (N, C, ...) with C = `num_features`, as its paper starts it.

    Args:
        options: `eps`, `affine`, and the method's own, as `methods()[method].options` lists them.

    Raises:
        NormswapError: an unknown method or option, or an impossible value.

    Examples:
        >>> import normswap
        >>> normswap.create("group_norm", 64, groups=8).num_groups
        8
    """
    known = method_named(method)
    if known.kind not in ("activation", "input"):
        verb = "parametrize" if known.kind == "weight" else "convert"
        raise NormswapError(f"{method} is made from what it normalizes; use {verb}")
    options = own_names(options)
    check_options(known, options)
    if num_features < 1:
        raise NormswapError(f"num_features must be at least 1, not {num_features}")
    return known.made(num_features, **options)


def own_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, in which `num_groups` of torch's GroupNorm is `groups`.

    Raises:
        NormswapError: both are given.
    """
    renamed = {"groups" if name == "num_groups" else name: v for name, v in options.items()}
    if len(renamed) < len(options):
        raise NormswapError("groups and num_groups are the same option; give one of them")
    return renamed


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Raise NormswapError if `method` does not take one of `options`, or not such a value of it."""
    taken = signature(method.build).parameters
    allowed = [*method.options, *(name for name in ("eps", "affine") if name in taken)]
    for name, value in options.items():
        if name not in allowed:
            raise NormswapError(
                f"{method.name} has no option {name!r}; it takes {', '.join(sorted(allowed))}"
            )
        limit = _LARGEST.get(type(value))
        if limit is not None and limit <= abs(value) < inf:
            raise NormswapError(f"{method.name} cannot take {name}={value!r}: it is too large")
        hint = taken[name].annotation
        if hint is Parameter.empty or isinstance(hint, str):  # a third party need not say
            continue
        try:
            _values_of(hint, name).validate_python(value)
        except ValidationError as error:
            faults = dict.fromkeys(each["msg"] for each in error.errors())
            what = "; or ".join(faults).replace("Input should", "it should")
            raise NormswapError(f"{method.name} cannot take {name}={value!r}: {what}") from None


@cache  # a recipe may replace a thousand modules, and an adapter takes a millisecond
def _values_of(hint: Any, name: str) -> TypeAdapter[Any]:
    bounded: Any = Annotated[(hint, _BOUNDS.get(name, Field()))]
    return TypeAdapter(bounded, config=_VALUES)


def values_over_all(channels: int, positions: int, options: Mapping[str, Any]) -> int:
    """`Method.values` of a statistic over all channels, and all positions or each."""
    return channels if options.get("per_position") else channels * positions
