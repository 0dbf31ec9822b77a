"""Which weights the affine of a normalization can be folded into, exactly.

The affine y = s x + t of a frozen BatchNorm can be applied upstream, to its input, or downstream,
to its output. Either way one value changes, and with it, by the rules of the table of operators,
values around it: an `AffinePropagation`. A site is folded, in order of preference,

1. upstream, into what computes its input;
2. downstream, into what takes its output;
3. upstream or downstream, while others that take or compute a changed value take the affine back.
   That needs its inverse, so it is for inference alone, and only where rounding stays harmless.

It is exact because everything that touches a changed value either passes the change by a rule, or
folds it in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.operators.layout import NONE, along
from normswap.graph.operators.normalizations import drops_shift, sets_of
from normswap.graph.operators.rule import Context, shape_of
from normswap.graph.propagation.absorbers import Absorber, Absorbers, multiple
from normswap.graph.propagation.current_affines import CurrentAffines
from normswap.graph.propagation.engine import Operators
from normswap.graph.propagation.owners import Owners, check_hooks
from normswap.graph.propagation.padding import Padding
from normswap.graph.propagation.scale_shift import (
    AffinePropagation,
    Conditions,
    ScaleShift,
    Stopped,
)
from normswap.graph.propagation.symbolic import absorber_of, producer
from normswap.graph.propagation.unseen import Unseen
from normswap.graph.sites import Call, NormSite


class Affines:
    """The affines of a captured model's BatchNorms, moved one after the other.

    Args:
        fixed: the numbers of all BatchNorms stay as they are. Where they will change (tune mode)
            nothing may depend on them, and no other BatchNorm folds in.
        training: what is found must hold in training mode too (dropout no longer commutes).
        downstream: an affine may also move to what takes its output.
        assume_example: the model is only called as in the example (`Unseen`).

    Attributes:
        owners: of the parameters of the model.
        conditions: what was decided by the numbers of the affine that was looked at last.
    """

    def __init__(
        self,
        seen: Capture,
        sites: Sequence[NormSite],
        *,
        fixed: bool = True,
        training: bool = False,
        downstream: bool = True,
        assume_example: bool = False,
    ) -> None:
        self._seen, self._index = seen, seen.index
        self._downstream = downstream
        self.owners = Owners(seen)
        self._unseen = Unseen(seen, sites, assume_example=assume_example)
        self._operators = Operators(sites)
        self._sites = {site.name: site for site in sites}
        self._moved: dict[str, NormSite] = {}
        self._ended: set[str] = set()  # sites that no other affine passes
        self._moved_calls: dict[fx.Node, Call] = {}  # of those, by what they compute
        self._aliases = {each.graph: self._index.aliases(each).copy() for each in seen.regions}
        self._current = CurrentAffines(self._index, self.owners, self._aliases, fixed=fixed)
        context = self.owners.context(training=training)
        self._context = replace(context, numbers=self._current.constant)
        self._absorbers = Absorbers(self._index, self.owners, self._operators)
        self._padding = Padding(self._index, self._context)
        self.conditions = Conditions()
        # With inverses a change goes all along a residual stream. Where one was stopped every other
        # is that begins with an element that carried one of the stopped channels, and need not go
        # all along it again.
        self._stopped: dict[tuple[fx.Node, bool], tuple[Tensor, Stopped]] = {}

    def absorbers(
        self,
        site: NormSite,
        *,
        inverse: bool = False,
        padded: bool = False,
        shift_stays: bool = False,
    ) -> tuple[Absorber, ...]:
        """The modules that can together fold in the affine of `site`.

        Args:
            inverse: some of them may take it back.
            padded: convolutions may add a shift that zeros around their input do not have, where
                that is cheaper than the affine.
            shift_stays: only the scale moves, to what computes the input of `site`; the shift is
                added at its place.

        Raises:
            Unsupported: it cannot be folded exactly; the message says what stops it.
        """
        self.check(site)
        self._unseen.check_calls(site)
        site = self._sites[site.name]  # with the calls that `Operators` knows
        if any(call.region.symbolic for call in site.executions):
            return self._symbolic(site)
        numbers, reasons = self.numbers(site), list[str]()
        self.conditions = Conditions()
        if inverse and (numbers is None or not numbers.invertible):
            raise Unsupported("taking its affine back would amplify rounding errors")
        for upstream in (True, False) if self._downstream and not shift_stays else (True,):
            try:
                found = self._of_site(
                    site, upstream=upstream, inverse=inverse, padded=padded, shift_stays=shift_stays
                )
                self._check_passed(site)
                taken_back = inverse and not self._current.has_changed(site)
                self.conditions = replace(self.conditions, invertible=taken_back)
                return found
            except Unsupported as reason:
                reasons.append(str(reason))
        before, after = reasons[0], reasons[-1]
        if before == after:
            raise Unsupported(before)
        raise Unsupported(f"cannot fold backward ({before}) or forward ({after})")

    def _check_passed(self, site: NormSite) -> None:
        for call, before, after in self._ends(site):
            own = {node for node in call.nodes if node is after or not site.tail}
            self._aliases[call.region.graph].check_passed(before, after, own)

    def moved(self, site: NormSite, absorbers: Sequence[Absorber], *, passed: bool = True) -> None:
        """Note that `absorbers` fold in `site`.

        Args:
            passed: another affine moves on through it from now on; otherwise none does, and it
                folds in none.
        """
        site = self._sites[site.name]
        if not passed:
            self._ended.add(site.name)
        else:
            self._moved[site.name] = site
            for call in () if site.tail else site.executions:
                if call.output is not None:
                    self._moved_calls[call.output] = call
        for call, before, after in self._ends(site):
            self._aliases[call.region.graph].passed(before, after)
        self._absorbers.given |= {absorber.path for absorber in absorbers if absorber.gives_bias}
        self._padding.moved(absorbers)
        for absorber in absorbers:
            into = self._sites[absorber.path] if absorber.normalization else None
            self._current.folded(absorber, self.numbers(site), into)

    def numbers(self, site: NormSite) -> ScaleShift | None:
        """The affine of `site` by now; None where the numbers will change or are not known."""
        return self._current.of(site)

    def check(self, site: NormSite) -> None:
        """Whether all of `site` is one affine that is seen, so that it can be moved or replaced.

        Raises:
            Unsupported: it is not; the message says why.
        """
        if not site.has_fixed_affine:
            raise Unsupported(
                "has no running statistics, so it depends on the batch in eval mode too"
            )
        self.owners.check_seen(site)
        norm = self._index.modules[site.name]
        for call in site.executions:
            check_hooks(norm, call)

    # --- a captured graph -------------------------------------------------------------------------

    def _of_site(
        self, site: NormSite, *, upstream: bool, inverse: bool, padded: bool, shift_stays: bool
    ) -> tuple[Absorber, ...]:
        outputs = ((self._operators.output(call), call) for call in site.executions)
        own = {node: call.input for node, call in outputs if node is not None}
        seeds, numbers = self._seeds(site, upstream), self.numbers(site)
        dropped = self._drops_shift(site, numbers) if upstream else None
        found = self.folds(
            seeds,
            own,
            numbers,
            upstream=upstream,
            inverse=inverse,
            shift_is_dropped=dropped is not None,
            scale_alone=shift_stays,
            subtracts=self._padding.can_add if padded else lambda _: False,
        )
        if dropped is not None:
            self.conditions = replace(self.conditions, no_shift=False, same_shift=dropped)
        if padded:
            found = tuple(map(self._padding.with_zeros, found))
            self._padding.check(found, sum(prod(shape_of(seed)) for seed in seeds))
        return found

    def _drops_shift(
        self, site: NormSite, numbers: ScaleShift | None
    ) -> tuple[tuple[int, ...], ...] | None:
        """The sets of channels whose one shift no one sees that takes the output of `site`.

        None where somebody sees it.
        """
        sets: set[tuple[int, ...]] = set()
        for call in site.executions:
            output = self._operators.output(call)
            if output is None:
                return None
            channels = torch.arange(site.num_features or 0)
            layout = along(len(shape_of(output)), site.channel_axis, channels)
            shift = None if numbers is None else numbers.shift.cpu()
            for user in output.users:
                if not drops_shift(user, layout, shift):
                    return None
                found = sets_of(user, layout)
                assert found is not None
                rows = found.reshape(-1, found.shape[-1]).tolist()
                sets |= {tuple(dict.fromkeys(row)) for row in rows}
        return tuple(sorted(each for each in sets if len(each) > 1))

    def folds(
        self,
        seeds: Mapping[fx.Node, Tensor],
        own: Mapping[fx.Node, fx.Node | None],
        numbers: ScaleShift | None,
        *,
        upstream: bool,
        inverse: bool = False,
        shift_is_dropped: bool = False,
        scale_alone: bool = False,
        new_biases: bool = True,
        subtracts: Callable[[fx.Node], bool] = lambda _: False,
    ) -> tuple[Absorber, ...]:
        """The modules that can together fold in an affine.

        Args:
            seeds: the values that change, each with its layout.
            own: the operators that compute the affine now (see `AffinePropagation`).
            numbers: the affine, None where it will change.
            upstream: the affine is applied before its own place.
            inverse: some may take it back.
            shift_is_dropped: what follows computes the same without the shift.
            scale_alone: only the scale moves.
            new_biases: a layer without a bias may be given one.
            subtracts: layers that need no bias for the shift (see `AffinePropagation`).

        Raises:
            Unsupported: it cannot be folded exactly; the message says what stops it.
        """
        channels = 1 + max(int(layout.max()) for layout in seeds.values())
        context = replace(self._context, channels=channels, stopping=[], scale_alone=scale_alone)
        no_shift = shift_is_dropped or scale_alone

        attempt = partial(
            self._folds, seeds, own, numbers, upstream, inverse, no_shift, new_biases, subtracts
        )
        try:
            return attempt(context)
        except Unsupported as reason:
            if not context.stopping:
                raise
            # A constant factor folds in a scale itself; a shift has to pass it.
            try:
                return attempt(replace(context, through=True))
            except Unsupported:
                raise reason from None

    def _folds(
        self,
        seeds: Mapping[fx.Node, Tensor],
        own: Mapping[fx.Node, fx.Node | None],
        numbers: ScaleShift | None,
        upstream: bool,
        inverse: bool,
        no_shift: bool,
        new_biases: bool,
        subtracts: Callable[[fx.Node], bool],
        context: Context,
    ) -> tuple[Absorber, ...]:
        self._current.consulted.clear()
        propagation = AffinePropagation(
            self._operators,
            self._index,
            context,
            own,
            upstream=upstream,
            inverse=inverse,
            moved=lambda each: each.name in self._moved,
            adjusts=self._can_change,
            subtracts=subtracts,
        )
        if inverse and len(seeds) == 1 and not context.through:
            self._propagate(propagation, seeds)
        else:
            propagation.propagate(seeds)
        known = propagation.known
        constraints = partial(
            propagation.solve,
            frozenset(seeds),
            has_bias=lambda each: (
                subtracts(each.node) or self._absorbers.has_bias(each, new=new_biases)
            ),
        )
        is_zero = False
        try:
            foldings, shifts, positive = constraints(no_shift=no_shift)
        except Unsupported:
            if no_shift or numbers is None or bool(numbers.shift.any()):
                raise
            # A shift that is 0 needs no place to go, as long as it stays 0.
            foldings, shifts, positive = constraints(no_shift=True)
            is_zero = True
        for layout in positive:
            _check_positive(numbers, layout)
        scaled = {c for layout in positive for c in layout[layout != NONE].tolist()}
        for value in known:
            self._unseen.check(self._index.region_of[value], [value])
        found: dict[Absorber, set[fx.Node]] = {}
        for each in foldings:
            if each.bias_alone and not any(map(multiple, shifts[each.value])):
                continue
            absorber = self._absorbers.of(each, shifts[each.value], (each.side == "in") == upstream)
            found.setdefault(absorber, set()).update(each.reads)
        self._absorbers.check_reads(found)
        self._padding.check_free(found)
        constants = tuple(self._current.consulted.items())
        self.conditions = Conditions(tuple(sorted(scaled)), is_zero, constants=constants)
        return tuple(replace(absorber, nodes=tuple(nodes)) for absorber, nodes in found.items())

    def _propagate(self, propagation: AffinePropagation, seeds: Mapping[fx.Node, Tensor]) -> None:
        """Propagate the change of one value, and remember where it was stopped."""
        ((value, layout),) = seeds.items()
        if (value, propagation.upstream) in self._stopped:
            reached, stopped = self._stopped[value, propagation.upstream]
            if bool((reached & (layout != NONE)).any()):
                raise stopped
        try:
            propagation.propagate(seeds)
        except Stopped as reason:
            for each, carried in propagation.known.items():
                reached = torch.isin(carried, reason.channels)
                if reached.any():
                    self._stopped[each, propagation.upstream] = reached, reason
            raise

    def _ends(self, site: NormSite) -> Iterator[tuple[Call, fx.Node, fx.Node]]:
        """Of each call what it normalizes, and the normalized value."""
        for call in site.executions:
            after = call.output if call.region.symbolic else self._operators.output(call)
            if call.input is not None and after is not None:
                yield call, call.input, after

    def _seeds(self, site: NormSite, upstream: bool) -> dict[fx.Node, Tensor]:
        seeds = {}
        for call in site.executions:
            value = call.input if upstream else self._operators.output(call)
            if value is None:
                raise Unsupported(
                    "takes more than one value" if upstream else "returns no one value"
                )
            rank = len(shape_of(value))
            if site.num_features is None or not -rank <= site.channel_axis < rank:
                raise Unsupported("normalizes a value without that axis")
            seeds[value] = along(rank, site.channel_axis, torch.arange(site.num_features))
        return seeds

    def _can_change(self, site: NormSite) -> bool:
        return site.name not in self._ended and self._current.can_change(site)

    # --- a symbolic trace -------------------------------------------------------------------------

    def _symbolic(self, site: NormSite) -> tuple[Absorber, ...]:
        found: dict[Absorber, set[fx.Node]] = {}
        for call in site.executions:
            node, path = producer(
                self._index.model, call, self._moved_calls, training=self._context.training
            )
            self._unseen.check(call.region, [node])
            absorber = absorber_of(self._index.modules[path], path, path in self._absorbers.given)
            found.setdefault(absorber, set()).add(node)
        self._absorbers.check_reads(found)
        return tuple(found)


def _check_positive(numbers: ScaleShift | None, layout: Tensor) -> None:
    channels = layout[layout != NONE]
    if numbers is None or not bool((numbers.scale[channels] > 0).all()):
        raise Unsupported("a maximum lies between them, which only a positive scale commutes with")
