"""Let a method compute the weights of a model: weight_norm, spectral_norm and their like.

Rules:
1. The weight of every selected Linear and convolution, transposed or not, becomes a parametrization
   of the method. One module under several names is one weight.
2. A weight that several modules share is left: each would have its own method for the same values.
3. A weight that is computed already, by any parametrization, is left: baked, it is a plain one.
4. So is one that the method cannot treat, with what the method says of it.
5. The norm of a convolution as a linear map depends on the size of its input: it is taken from the
   example inputs where it is not given.
"""

from collections import Counter
from typing import Any

from torch import Tensor, nn

from normswap.core.calls import cloned, running_on
from normswap.core.compat import AnyConv
from normswap.core.errors import NormswapError, Unsupported
from normswap.graph.index import own_tensors
from normswap.graph.parametrized import chain_of, parametrized_tensors
from normswap.graph.running import as_call
from normswap.graph.snapshot import evaluating
from normswap.norms.calling import input_of
from normswap.norms.registry import check_options, method_named
from normswap.passes.edits import ParametrizeTensor
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, any_matches, listed

TENSOR = "weight"


class Parametrize:
    """Parametrize the selected weights by `method`; see the module's docstring for the rules.

    Args:
        method: the name of a method of kind "weight" (`normswap.methods()`).
        include, exclude: globs on the names of Linears and convolutions; by default all of them.
        options: of the method.
    """

    def __init__(
        self,
        method: str,
        *,
        include: Globs | None = None,
        exclude: Globs = (),
        **options: Any,
    ) -> None:
        self.method = method_named(method)
        if self.method.kind != "weight":
            raise NormswapError(
                f"{method} does not compute a weight; use convert(model, {method!r})"
            )
        check_options(self.method, options)
        self.include, self.exclude, self.options = include, exclude, options

    def __str__(self) -> str:
        return f"Parametrize({self.method.name})"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """One edit for each selected weight that can be given the method.

        Raises:
            NormswapError: nothing is selected, or the method fits none of what is.
        """
        layers = _layers(model)
        included = _matching(layers, self.include) if self.include is not None else set(layers)
        excluded = _matching(layers, self.exclude)
        owners = Counter(id(t) for module in model.modules() for _, t in own_tensors(module))
        sizes = self._input_sizes(model, inputs)
        edits, left = [], []
        for layer, (path, *_) in layers.items():
            try:
                if layer in excluded:
                    raise Unsupported("excluded")
                if layer not in included:
                    raise Unsupported("not included")
                _check_weight(layer, owners)
                edits.append(self._edit(layer, path, sizes))
            except (Unsupported, NormswapError) as reason:
                left.append(Skipped(site=path, reason=str(reason)))
        if not edits:
            first = f": {left[0].site}: {left[0].reason}" if left else ", it has none"
            raise NormswapError(
                f"no weight of a Linear or convolution of this model can be given "
                f"{self.method.name}{first}"
            )
        # With other options than its own a method may compute something else.
        exact = self.method.keeps == "exact" and not self.options
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left), exact=exact)

    def _edit(
        self, layer: nn.Module, path: str, sizes: dict[nn.Module, list[int]]
    ) -> ParametrizeTensor:
        options = dict(self.options)
        if layer in sizes:
            options["input_size"] = sizes[layer]
        self.method.made(layer, TENSOR, **options)  # what it objects to is better known now
        assert isinstance(layer.weight, Tensor)
        shape = "x".join(map(str, layer.weight.shape))
        return ParametrizeTensor(
            site=path,
            path=path,
            reason=f"{type(layer).__name__} with a weight of {shape}",
            tensor=TENSOR,
            method=self.method.name,
            options=options,
        )

    def _input_sizes(self, model: nn.Module, inputs: Any) -> dict[nn.Module, list[int]]:
        """What each convolution receives first, where the method asks for that and it is open."""
        asked = self.options.get("conv") == "operator" and "input_size" not in self.options
        return _received_sizes(model, inputs) if asked and inputs is not None else {}


def _layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The Linears and convolutions, each with all its names."""
    layers: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, AnyConv)):
            layers.setdefault(module, []).append(path)
    return layers


def _matching(layers: dict[nn.Module, list[str]], globs: Globs) -> set[nn.Module]:
    matching = set()
    for glob in listed(globs):
        found = {layer for layer, paths in layers.items() if any_matches(paths, glob)}
        if not found:
            names = [paths[0] for paths in layers.values()]
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise NormswapError(
                f"{glob!r} matches none of the {len(names)} Linears and convolutions ({shown})"
            )
        matching |= found
    return matching


def _check_weight(layer: nn.Module, owners: Counter[int]) -> None:
    if TENSOR in parametrized_tensors(layer):
        names = ", ".join(type(share).__name__ for share in chain_of(layer, TENSOR))
        raise Unsupported(f"its weight is parametrized already ({names}); bake it first")
    weight = dict(layer.named_parameters(recurse=False)).get(TENSOR)
    if weight is None:
        raise Unsupported("its weight is no parameter (a hook or another module computes it)")
    if not weight.is_floating_point():
        raise Unsupported(f"its weight is of {weight.dtype}")
    if owners[id(weight)] > 1:
        raise Unsupported("its weight is tied to that of another module")


def _received_sizes(model: nn.Module, inputs: Any) -> dict[nn.Module, list[int]]:
    sizes: dict[nn.Module, list[int]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, AnyConv)
        shape = input_of(layer, args, kwargs).shape
        sizes.setdefault(layer, list(shape[-len(layer.kernel_size) :]))

    args, kwargs = cloned(as_call(inputs))
    with evaluating(model):
        for layer in _layers(model):
            if isinstance(layer, AnyConv):
                layer.register_forward_pre_hook(note, with_kwargs=True)
        with running_on(inputs, "give inputs it takes"):
            model(*args, **kwargs)
    return sizes
