"""The names that the weights of one model have in the files of others.

What wraps a model puts a prefix before every name (`module.` of DataParallel, `_orig_mod.` of
torch.compile, `model.` or `net.` of a Lightning module), and what trains one saves its state dict
as one entry of several (`state_dict`, `model_state_dict`, `generator`, `params_ema`). Neither
is looked for by its name: whatever makes the names fit is taken off.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

DEPTH = 4  # of dictionaries in dictionaries in which a state dict is looked for
_LONGEST_PREFIX = 16  # modules
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
    return _state_dicts(content, "", DEPTH, set())


def _state_dicts(content: Any, entry: str, depth: int, seen: set[int]) -> Iterator[StateDict]:
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
            yield from _state_dicts(value, inner, depth - 1, seen)


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
