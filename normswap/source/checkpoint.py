"""Weights from a file, without running anything that the file holds.

Two formats: safetensors, and what `torch.save` wrote, the latter under `weights_only=True` alone,
where the unpickler builds tensors and containers and refuses every other global.

The names that the weights of one model have in the files of others differ. What wraps a model puts
a prefix before every name (`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` or
`net.` of a Lightning module), and what trains one saves its state dict as one entry of several
(`state_dict`, `model_state_dict`, `generator`, `params_ema`). Neither is looked for by its name:
whatever makes the names fit is taken off.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from normswap.core.ambient import warnings_ignored
from normswap.core.atomic import of_one_file
from normswap.core.errors import NormswapError, first_line
from normswap.core.memory import Allowance
from normswap.source.archive import check_saved, no_checkpoint
from normswap.source.factory import nearest

DEPTH = 4  # of dictionaries in dictionaries in which a state dict is looked for
_LONGEST_PREFIX = 16  # modules
_LIGHTNING = b"pytorch-lightning_version"
_COMPILED = "_orig_mod"  # torch.compile's wrapper, which may be around any module inside


@dataclass(frozen=True, eq=False)
class StateDict:
    """A state dict in a checkpoint.

    Attributes:
        entry: where it stands, "" for the whole file.
        tensors: by their names.
    """

    entry: str
    tensors: Mapping[str, Tensor]

    @property
    def averaged(self) -> bool:
        """Whether it says that it holds averages of the weights, as one evaluates."""
        return any(word in self.entry.lower() for word in ("ema", "averag"))


def state_dicts(content: Any) -> Iterator[StateDict]:
    """The dictionaries in `content` that hold tensors, by names, and nothing else."""
    return _nested(content, "", DEPTH, set())


def _nested(content: Any, entry: str, depth: int, seen: set[int]) -> Iterator[StateDict]:
    # A pickle may hold one dictionary a thousand times, in a thousand others.
    if not isinstance(content, Mapping) or not depth or id(content) in seen:
        return
    seen.add(id(content))
    if content and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        yield StateDict(entry, content)
        return
    for name, value in content.items():
        if isinstance(value, Mapping):
            inner = f"{entry}.{name}" if entry else str(name)
            yield from _nested(value, inner, depth - 1, seen)


def renamed(found: Iterable[str], wanted: Iterable[str]) -> tuple[dict[str, str], str]:
    """For each name of a file that of the model, and what was done to make them fit.

    A prefix that all have is left out, or one that all of the model's have is put before them;
    torch.compile's `_orig_mod` counts nowhere; the weight_g and weight_v of torch's older
    weight_norm are what its parametrization holds. As many names fit as can be made to.
    """
    plain, of_model = _plain(found), _plain(wanted)
    names = {plain: name for name, plain in of_model.items()}

    def fitting(way: tuple[str, str]) -> int:
        return sum(_moved(each, way) in names for each in plain.values())

    ways = [(prefix, "") for prefix in _prefixes(plain.values())]
    ways += [("", prefix) for prefix in _prefixes(of_model.values())]
    # The first of the best, which changes least.
    way = ways[0] if fitting(ways[0]) == len(plain) else max(ways, key=fitting)
    there = {name: names.get(_moved(each, way), _moved(name, way)) for name, each in plain.items()}
    return there, _said(there, way)


def _moved(name: str, way: tuple[str, str]) -> str:
    without, before = way
    return before + name.removeprefix(without)


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Each name without what wraps modules inside, and as parametrizations have it today."""
    given = list(names)
    plain = {
        name: ".".join(part for part in name.split(".") if part != _COMPILED) for name in given
    }
    there = {*plain.values()}
    if len(there) < len(given):  # two would be one
        return {name: name for name in given}
    return {name: _parametrized(each, there) for name, each in plain.items()}


def _parametrized(name: str, there: set[str]) -> str:
    stem, _, last = name.rpartition("_")
    if last not in ("g", "v") or not {f"{stem}_g", f"{stem}_v"} <= there:
        return name
    module, _, tensor = stem.rpartition(".")
    held = f"parametrizations.{tensor}.original{'gv'.index(last)}"
    return f"{module}.{held}" if module else held


def _prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes that all `names` have, the shortest, "", first."""
    modules = [name.split(".", _LONGEST_PREFIX)[:-1] for name in names]
    columns = zip(*modules, strict=False)  # as far as the shortest goes
    common = [parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, columns)]
    return ["".join(f"{part}." for part in common[:count]) for count in range(len(common) + 1)]


def _said(names: Mapping[str, str], way: tuple[str, str]) -> str:
    without, before = way
    said = [f"leaves out {without!r}"] if without else [f"puts {before!r} before"] if before else []
    if any((_COMPILED in a.split(".")) != (_COMPILED in b.split(".")) for a, b in names.items()):
        said.append(f"leaves out {_COMPILED + '.'!r}")
    if any(a.endswith("_g") and b.endswith(".original0") for a, b in names.items()):
        said.append("takes weight_g and weight_v of an older weight_norm")
    return ", ".join(said)


_COUNT = "num_batches_tracked"
_MOST_CANDIDATES = 64  # of the entries of a file; each is compared with the whole model


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`, on the CPU.

    It may be an entry of the file, at any name: the largest is read, and of several the first that
    holds averages of the weights. "module." is dropped where every name starts with it
    (DataParallel and DistributedDataParallel put it there).

    Raises:
        NormswapError: there is no such file, it is damaged, or it holds more than tensors.
    """
    found = max(_state_dicts(path), key=lambda each: (len(each.tensors), each.averaged)).tensors
    _check_plain(path, found)
    wrapped = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if wrapped else name: v for name, v in found.items()}


def load_checkpoint(model: nn.Module, path: Path, *, key: str | None = None) -> str:
    """Load the weights in `path` into `model`, in place; every name and shape must agree.

    They agree also after a wrapper or prefix is taken off. Where several entries of the file fit,
    that which says that it holds averages of the weights is taken, for these are what one
    evaluates, and otherwise the first. `num_batches_tracked` alone may be
    absent, as torch allows: BatchNorm before 0.4.1 had none.

    Args:
        key: the entry to take, such as "state_dict_ema", or "train.model" for one in another.

    Returns:
        What was done to make the names fit; "" where they did.

    Raises:
        NormswapError: as `read_checkpoint`, or a name or shape differs; `model` is then unchanged.
    """
    wanted = model.state_dict()
    found = _state_dicts(path)
    candidates = _large_enough(found, wanted) if key is None else _at(key, found, path)
    if len(candidates) > _MOST_CANDIDATES:
        raise NormswapError(
            f"checkpoint {str(path)!r} holds {len(candidates):,} state dicts; "
            "save the one that is meant to a file of its own"
        )
    for each in candidates:
        _check_plain(path, each.tensors)
    fits = [_Match.of(each, wanted) for each in candidates]
    fewest = min(fit.problems for fit in fits)
    fitting = [fit for fit in fits if fit.problems == fewest]
    chosen = max(fitting, key=lambda fit: fit.saved.averaged)  # the first of them
    if fewest:
        raise NormswapError(
            f"checkpoint {str(path)!r} does not fit the model: {chosen.differences}; "
            "pass the checkpoint of this architecture"
        )
    # Names and shapes are today's, so today's layout version is right; without it some modules
    # (torchvision's MNASNet) refuse to load.
    state = OrderedDict(chosen.state)
    state._metadata = getattr(wanted, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(state)
    others = [repr(fit.saved.entry) for fit in fitting if fit is not chosen]
    also = f", not {', '.join(others)}, which would fit as well" if others else ""
    entry = f"takes {chosen.saved.entry!r}{also}" if chosen.saved.entry else ""
    return ", ".join(filter(None, (entry, chosen.done)))


@dataclass(frozen=True)
class _Match:
    """How a state dict of the file fits the model.

    Attributes:
        state: it, by the names of the model.
        done: what was done to the names.
        problems: how many names and shapes differ.
        differences: which.
    """

    saved: StateDict
    state: Mapping[str, Tensor]
    done: str
    problems: int
    differences: str

    @classmethod
    def of(cls, saved: StateDict, wanted: Mapping[str, Tensor]) -> "_Match":
        names, done = renamed(saved.tensors, wanted)
        state = {names[name]: value for name, value in saved.tensors.items()}
        for name, value in wanted.items():
            if name.endswith(_COUNT):
                state.setdefault(name, torch.zeros_like(value))
        found = _differences(state, wanted)
        told = [f"{len(n)} {what}: {_some(n)}" for what, n in found.items() if n]
        return cls(saved, state, done, sum(map(len, found.values())), "; ".join(told))


def _at(key: str, found: list[StateDict], path: Path) -> list[StateDict]:
    chosen = [each for each in found if each.entry == key]
    if not chosen:
        there = [each.entry for each in found if each.entry]
        raise NormswapError(
            f"checkpoint {str(path)!r} has no state dict at {key!r}"
            + (nearest(key, there) if there else "; the whole file is one, so leave the key out")
        )
    return chosen


def _large_enough(found: list[StateDict], wanted: Mapping[str, Tensor]) -> list[StateDict]:
    """Those that can fit; the largest where none can. An optimizer's has one for each weight."""
    needed = sum(not name.endswith(_COUNT) for name in wanted)
    largest = max(len(each.tensors) for each in found)
    return [each for each in found if len(each.tensors) >= min(needed, largest)]


def _state_dicts(path: Path) -> list[StateDict]:
    content = _read(path)
    found = list(state_dicts(content))
    if found:
        # A tensor may claim any size, all of its elements lying in one place.
        held = {id(value): value for each in found for value in each.tensors.values()}
        allowance = Allowance.of_file(path, f"checkpoint {str(path)!r}")
        size = sum(each.numel() * each.element_size() for each in held.values() if _is_plain(each))
        allowance.check(size, "its tensors")
        return found
    if not isinstance(content, Mapping) or not content:
        raise NormswapError(
            f"checkpoint {str(path)!r} holds no state dict; save one with "
            "torch.save(model.state_dict(), path)"
        )
    name, value = next(
        (name, value)
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    )
    raise NormswapError(
        f"checkpoint {str(path)!r} is not a state dict: entry {name!r} is of type "
        f"{type(value).__name__}; save one with torch.save(model.state_dict(), path)"
    )


def _check_plain(path: Path, state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if not _is_plain(value):
            raise NormswapError(
                f"checkpoint {str(path)!r} holds {name!r} without its numbers, or in a form that "
                "no layer takes (meta, sparse, quantized, nested); save a plain tensor"
            )


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} ({_shape(found[name])}, the model has {_shape(value)})"
            for name, value in wanted.items()
            if name in found and not _same_shape(found[name], value)
        ],
        "complex, not so in the model": [
            name
            for name, value in wanted.items()
            if name in found and found[name].is_complex() and not value.is_complex()
        ],
    }


def _read(path: Path) -> Any:
    return of_one_file(path, _content)


def _content(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(0, "it is no file but a pipe or a device")  # which may never end
        with path.open("rb") as file:
            head = file.read(9)
    except (OSError, ValueError) as error:  # the latter for a path with a NUL in it
        reason = getattr(error, "strerror", None) or first_line(error)
        raise NormswapError(
            f"cannot read checkpoint {str(path)!r}: {reason}; check the path"
        ) from error
    other = no_checkpoint(path)
    if other:
        raise NormswapError(f"checkpoint {str(path)!r} is {other}")
    allowance = Allowance.of_file(path, f"checkpoint {str(path)!r}")
    try:
        # A safetensors file is the header's length in eight bytes, then the header, which is JSON.
        if head[8:] == b"{" or path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with path.open("rb") as file:
            check_saved(file, allowance.name, allowance)
        with warnings_ignored():  # on pickle protocols; what comes of them is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except NormswapError:
        raise
    except Exception as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            what, remedy = "holds more than tensors", "save model.state_dict() instead"
            if _LIGHTNING in path.read_bytes():
                what = "is a checkpoint of Lightning that holds more than tensors"
                remedy = "where you trust it, write its entry 'state_dict' to a file of its own"
            raise NormswapError(
                f"checkpoint {str(path)!r} {what} (loading it would run {forbidden[1]}), nothing "
                f"was run; {remedy}"
            ) from error
        raise NormswapError(
            f"checkpoint {str(path)!r} is damaged, or neither safetensors nor a state dict "
            f"that torch.save wrote ({type(error).__name__}); save or download it again"
        ) from error


def _is_plain(value: Tensor) -> bool:
    dense = value.layout is torch.strided and not value.is_nested and not value.is_quantized
    return dense and value.device.type == "cpu"


def _same_shape(found: Tensor, wanted: Tensor) -> bool:
    return nn.parameter.is_lazy(wanted) or found.shape == wanted.shape


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
