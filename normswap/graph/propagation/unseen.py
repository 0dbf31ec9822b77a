"""What the example does not show: who else takes a value, on other arguments, sizes or attributes.

A captured graph is of one example. `self.bns[domain](self.conv(x))` shows one of the BatchNorms,
and what moves into the convolution moves for all of them. Two things tell of others:

1. A normalization that was never called, in a module whose forward holds a value that changes.
2. A forward that gives the value to others on another path (`normswap.graph.undecided`). Where
   several examples were given, they show what there is, and this is not asked.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.functional_norms import operator_name
from normswap.graph.index import Region
from normswap.graph.norm_modules import norm_kind
from normswap.graph.operators.rule import shape_of
from normswap.graph.sites import NormSite, describe
from normswap.graph.snapshot import own_forwards_kept, untouched
from normswap.graph.undecided import Undecided, Value, end_of, is_call, undecided

_Framed = tuple[fx.Node, list[tuple[str, str]]]  # a node, and the calls that it ran in
_REMEDY = "give several examples as a list, or assume_example=True"


class Unseen:
    """Tells of values whether the example shows all that takes them.

    Args:
        assume_example: the model is only called as in the example, so that there is nothing else.
    """

    def __init__(self, seen: Capture, sites: Sequence[NormSite], *, assume_example: bool) -> None:
        self._seen, self._index, self._assume = seen, seen.index, assume_example
        self._undecided: dict[nn.Module, Undecided | None] = {}
        self._silent: dict[nn.Module, list[NormSite]] | None = None  # by whose forward it is in
        self._sites = sites

    def check(self, region: Region, values: Iterable[fx.Node]) -> None:
        """Raise unless all that takes one of `values` is in the captured graphs.

        Raises:
            Unsupported: the example does not show it.
        """
        if self._assume:
            return
        for value in values:
            if value.op == "placeholder" and value in region.tensors:
                continue
            before = self._frames(region, value)
            for user in value.users:
                after = self._frames(region, user)
                common = sum(a == b for a, b in zip(before, after, strict=False))
                for depth in range(max(common - 1, 0), len(before)):
                    self._check_frame(region, value, before, depth)
                for depth in range(common, len(after)):
                    self._check_entered(region, value, after[depth][1])
                if common:
                    self._check_taker(region, (value, before), (user, after), common - 1)

    def check_calls(self, site: NormSite) -> None:
        """Raise unless the example shows all calls of `site`.

        Raises:
            Unsupported: it is one of several in a list or dictionary, from which a forward that no
                trace can follow chooses by an argument.
        """
        holder = self._index.modules[site.name.rpartition(".")[0]]
        if self._assume or self._seen.examples > 1:
            return
        if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
            return
        others = [norm_kind(member) is not None for member in holder.children()]
        path = site.name.rpartition(".")[0]
        while isinstance(self._index.modules[path], (nn.ModuleList, nn.ModuleDict)) and path:
            path = path.rpartition(".")[0]
        owner = self._index.modules[path]
        arguments = len(inspect.signature(owner.forward).parameters)
        if sum(others) > 1 and arguments > 1 and self._traced(owner) is None:
            raise Unsupported(
                f"{type(owner).__name__}.forward may choose by an argument where it is called; "
                f"{_REMEDY}"
            )

    def _frames(self, region: Region, node: fx.Node) -> list[tuple[str, str]]:
        """The calls that `node` ran in, outermost first, that of the region's module included."""
        stack = region.stack(node)
        if region.symbolic:  # whose calls are known by the modules' paths alone
            parts = str(node.target).split(".") if node.op == "call_module" else []
            paths = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
            return [(path, path) for path in paths]
        top = ("", region.path)
        return stack if stack and stack[0][1] == region.path else [top, *stack]

    def _check_frame(
        self, region: Region, value: fx.Node, frames: list[tuple[str, str]], depth: int
    ) -> None:
        module = self._index.modules[frames[depth][1]]
        self._check_silent(region, value, module)
        if self._seen.examples > 1:
            return
        undecided = self._paths(module)
        if self._is_among(undecided.values, value, frames, depth, may_be=undecided.may_be):
            raise self._reason(region, value, module)

    def _is_among(
        self,
        differing: Iterable[Value],
        node: fx.Node,
        frames: list[tuple[str, str]],
        depth: int,
        member: int = -1,
        *,
        may_be: Callable[[Iterable[Value], str], bool] = is_call,
    ) -> bool:
        """Whether `node`, or the child that it runs in, is one of these in the frame at `depth`."""
        if node.op == "placeholder":
            return ("placeholder", str(node.target)) in differing
        if depth + 1 == len(frames):
            return may_be(differing, operator_name(node))
        module = self._index.modules[frames[depth][1]]
        child = self._index.modules[end_of(self._seen.model, frames[depth + 1][1], member)]
        names = (name for what, name in differing if what == "call_module")
        return any(module.get_submodule(name) is child for name in names)

    def _check_taker(self, region: Region, value: _Framed, user: _Framed, depth: int) -> None:
        """Raise where `user`, which takes `value` here, takes something else on another path."""
        if self._seen.examples > 1:
            return
        module = self._index.modules[user[1][depth][1]]
        undecided = self._paths(module)
        for taker, always in undecided.takers.items():
            other = self._is_among([taker], *user, depth, 0, may_be=undecided.may_be)
            if other and not self._is_among(always, *value, depth):
                raise Unsupported(
                    f"{type(module).__name__}.forward decides by arguments, sizes or attributes "
                    f"what {describe(user[0], region)} takes, and one example shows one way; "
                    f"{_REMEDY}"
                )

    def _check_entered(self, region: Region, value: fx.Node, path: str) -> None:
        """The same of a module that `value` is given to."""
        module = self._index.modules[path]
        self._check_silent(region, value, module)
        values = self._paths(module).values
        if self._seen.examples == 1 and any(what == "placeholder" for what, _ in values):
            raise self._reason(region, value, module)

    def _reason(self, region: Region, value: fx.Node, module: nn.Module) -> Unsupported:
        return Unsupported(
            f"{type(module).__name__}.forward decides by arguments, sizes or attributes what takes "
            f"{describe(value, region)}, and one example shows one way; {_REMEDY}"
        )

    def _paths(self, module: nn.Module) -> Undecided:
        return self._traced(module) or Undecided()

    def _traced(self, module: nn.Module) -> Undecided | None:
        if module not in self._undecided:
            new = [each for each in (module, *self._ran) if each not in self._undecided]
            # A normalization is known by what it computes, whatever it decides inside.
            known = {each for each in new if norm_kind(each) is not None}
            with untouched(self._seen.model, training=False):  # once for all, as it takes a while
                for each in dict.fromkeys(new):
                    with own_forwards_kept(each):
                        self._undecided[each] = Undecided() if each in known else undecided(each)
        return self._undecided[module]

    @cached_property
    def _ran(self) -> dict[nn.Module, None]:
        """The modules in whose forward something was captured, in order."""
        paths = {
            path: None
            for node, region in self._index.region_of.items()
            for _, path in self._frames(region, node)
        }
        return dict.fromkeys(self._index.modules[path] for path in paths)

    def _check_silent(self, region: Region, value: fx.Node, module: nn.Module) -> None:
        """Raise where a normalization that was never called may take `value` in `module`."""
        if self._silent is None:
            self._silent = self._never_called()
        shape = () if region.symbolic else shape_of(value)
        for site in self._silent.get(module, ()):
            parent = self._index.modules[site.name.rpartition(".")[0]]
            direct = parent is module or isinstance(parent, (nn.ModuleList, nn.ModuleDict))
            if not direct and self._traced(module) is not None:
                continue  # what may be given to the module that it is in, the paths show
            if not direct or not shape or site.num_features in (None, *shape):
                raise Unsupported(
                    f"{site.name}, which the example does not call, may take "
                    f"{describe(value, region)} too; {_REMEDY}"
                )

    def _never_called(self) -> dict[nn.Module, list[NormSite]]:
        found: dict[nn.Module, list[NormSite]] = {}
        for site in self._sites:
            if site.calls != 0:
                continue
            path = site.name
            if self._is_cut_off(path):
                continue
            while path:
                path = path.rpartition(".")[0]
                module = self._index.modules[path]
                if module in self._ran:
                    found.setdefault(module, []).append(site)
                    break
        return found

    def _is_cut_off(self, path: str) -> bool:
        """Whether it is in a Sequential of which a forward calls some members: no other choice."""
        while path:
            path = path.rpartition(".")[0]
            above = self._index.modules[path]
            if type(above) is nn.Sequential and not self._ran.keys().isdisjoint(above.children()):
                return True
        return False
