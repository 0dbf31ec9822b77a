"""How far the activations of a model reach on data: the largest |value| of each operator."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, fx, nn

from normswap.core.compat import pytree
from normswap.core.errors import NormswapError, warn
from normswap.core.interrupts import at_last
from normswap.fit.batch import inputs_for, run
from normswap.fit.reading import Reading
from normswap.graph.capture import Capture, examples_of
from normswap.graph.index import Region
from normswap.graph.snapshot import evaluating
from normswap.passes.rescale import Ranges

_MOST_SHAPES = 16  # each is captured by itself


def shapes_in(model: nn.Module, inputs: Any, data: Iterable[Any]) -> list[Any]:
    """Example inputs for each shape that the model is called with: `inputs`, and those of `data`.

    Raises:
        NormswapError: the data have no batch, or too many shapes.
    """
    found = {_shapes(example): example for example in examples_of(inputs)}
    reading = Reading(data)
    for batch in reading:
        with reading.current():
            args, kwargs = inputs_for(model, batch)
            example = kwargs or args
            found.setdefault(_shapes(example), example)
    if not reading.number:
        raise NormswapError("the data have no batch; give some to measure the ranges on")
    if len(found) > _MOST_SHAPES:
        raise NormswapError(
            f"the data have {len(found)} different shapes, and each is captured by itself; give "
            f"batches of at most {_MOST_SHAPES}"
        )
    return list(found.values())


def _shapes(example: Any) -> tuple[Any, ...]:
    return tuple(
        tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in pytree.tree_leaves(example)
    )


class _Recorder(fx.Interpreter):
    """Runs a captured graph, and keeps how far each value reaches."""

    def __init__(self, region: Region, ranges: dict[tuple[int, str, str], float]) -> None:
        super().__init__(fx.GraphModule(nn.Module(), region.graph))
        self._region, self._ranges = region, ranges

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator."""
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            key = self._region.example, self._region.path, n.name
            reach = float(value.detach().abs().max())
            reach = float("inf") if reach != reach else reach
            self._ranges[key] = max(self._ranges.get(key, 0.0), reach)
        return value


def ranges_on(seen: Capture, data: Iterable[Any]) -> Ranges:
    """The largest |value| of each node of the captured graphs, on `data`.

    Args:
        seen: a capture with an example of each shape in `data` (`shapes_in`).

    Raises:
        NormswapError: the model does not run on a batch.
    """
    ranges: dict[tuple[int, str, str], float] = {}
    model, hooks = seen.model, ExitStack()
    by_path: dict[str, list[Region]] = {}
    for region in seen.regions:
        if region.symbolic or any(node.op == "get_attr" for node in region.graph.nodes):
            warn(f"the ranges in {region.path or 'the model'} are not measured", stacklevel=2)
        else:
            by_path.setdefault(region.path, []).append(region)

    def watching(path: str) -> Any:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaves = pytree.tree_leaves((args, kwargs))
            for region in by_path[path]:
                if _takes(region, leaves):
                    _Recorder(region, ranges).run(*_placed(seen, region, leaves))
                    return

        return watch

    reading = Reading(data)
    with at_last(hooks.close), evaluating(model):
        for path in by_path:
            module = model.get_submodule(path)
            watch = watching(path)
            hooks.enter_context(module.register_forward_pre_hook(watch, with_kwargs=True))
        for batch in reading:
            with reading.current():
                run(model, batch)
    return ranges


def _given(region: Region) -> list[fx.Node]:
    """The placeholders of what the model is called with, in order."""
    return [
        node
        for node in region.graph.nodes
        if node.op == "placeholder" and node not in region.tensors and node not in region.constants
    ]


def _takes(region: Region, leaves: list[Any]) -> bool:
    """Whether `region` was captured with inputs of these shapes."""
    given = _given(region)
    return len(given) == len(leaves) and all(
        not isinstance(leaf, Tensor)
        or (isinstance(node.meta["val"], Tensor) and node.meta["val"].shape == leaf.shape)
        for node, leaf in zip(given, leaves, strict=True)
    )


def _placed(seen: Capture, region: Region, leaves: list[Any]) -> list[Any]:
    """The arguments of the graph, by its placeholders."""
    given: Mapping[fx.Node, Any] = dict(zip(_given(region), leaves, strict=True))
    held = []
    for node in region.graph.nodes:
        if node.op != "placeholder":
            continue
        if node in region.tensors:
            held.append(seen.index.tensor(region.tensors[node]))
        else:
            value = region.constants[node] if node in region.constants else given[node]
            held.append(value.clone() if isinstance(value, Tensor) else value)
    return held
