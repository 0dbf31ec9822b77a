"""Which weights can absorb the affine of a normalization, exactly.

The affine y = s x + t of a frozen BatchNorm can be applied early, to its input, or late, to its
output. Either way one value changes, and with it, by the rules of the table (`rules`), values
around it: a `Movement`. In order of preference a site is absorbed

1. early, by what computes its input;
2. late, by what takes its output;
3. early or late, while others that take or compute a changed value take the affine back. That needs
   its inverse, so it is for inference alone, and only where rounding stays harmless.

It is exact because everything that touches a changed value either passes the change by a rule, or
absorbs it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from normswap.graph.affine.absorber import Absorber
from normswap.graph.affine.joins import Joins
from normswap.graph.affine.layout import NONE, along
from normswap.graph.affine.movement import Movement, Operators, Stopped
from normswap.graph.affine.numbers import Numbers, numbers_of
from normswap.graph.affine.owners import Owners, check_hooks
from normswap.graph.affine.rules.invariant import drops_shift
from normswap.graph.affine.rules.rule import Absorbing, shape_of
from normswap.graph.affine.symbolic import absorber_of, producer
from normswap.graph.capture import Capture
from normswap.graph.norm_modules import Unsupported
from normswap.graph.reads import own_tensors
from normswap.graph.sites import Call, NormSite


class Affines:
    """The affines of a captured model's BatchNorms, moved one after the other.

    Args:
        fixed: the numbers of all BatchNorms stay as they are. Where they will change (tune mode)
            nothing may depend on them, and no other BatchNorm absorbs.
        training: what is found must hold in training mode too (dropout no longer commutes).
        late: an affine may also move to what takes its output.
    """

    def __init__(
        self,
        model: nn.Module,
        seen: Capture,
        sites: Sequence[NormSite],
        *,
        fixed: bool = True,
        training: bool = False,
        late: bool = True,
    ) -> None:
        self._model, self._seen, self._fixed, self._late = model, seen, fixed, late
        self._owners = Owners(model, seen)
        self._operators = Operators(sites)
        self._sites = {site.name: site for site in sites}
        self._context = self._owners.context(training=training)
        self._moved: dict[str, NormSite] = {}
        self._moved_calls: dict[fx.Node, Call] = {}  # of those, by what they compute
        self._joins = {id(each): Joins(each) for each in seen.regions}
        self._given: set[str] = set()  # modules that have been given a bias
        self._changed: dict[str, Numbers | None] = {}  # of sites that took up another's
        # With inverses a change goes all along a residual stream. Where one was stopped every other
        # is that begins with one of its values, and need not go all along it again.
        self._stopped: dict[tuple[fx.Node, bool], tuple[Tensor, Stopped]] = {}

    def absorbers(self, site: NormSite, *, inverse: bool = False) -> tuple[Absorber, ...]:
        """The modules that can together absorb the affine of `site`.

        Args:
            inverse: some of them may take it back.

        Raises:
            Unsupported: it cannot be absorbed exactly; the message says what stops it.
        """
        self.check(site)
        site = self._sites[site.name]  # with the calls that `Operators` knows
        if any(call.region.symbolic for call in site.executions):
            return self._symbolic(site)
        numbers, reasons = self._numbers(site), []
        if inverse and (numbers is None or not numbers.invertible):
            raise Unsupported("taking its affine back would amplify rounding errors")
        for early in (True, False) if self._late else (True,):
            try:
                found = self._absorbers(site, early=early, inverse=inverse)
                self._check_joins(site)
                return found
            except Unsupported as reason:
                reasons.append(str(reason))
        raise Unsupported("; ".join(dict.fromkeys(reasons)))

    def _check_joins(self, site: NormSite) -> None:
        for call, before, after in self._ends(site):
            own = {node for node in call.nodes if node is after or not site.tail}
            self._joins[id(call.region)].check(before, after, own)

    def moved(self, site: NormSite, absorbers: Sequence[Absorber], *, passed: bool = True) -> None:
        """Note that `absorbers` take up `site`.

        Args:
            passed: another affine moves on through it from now on.
        """
        site = self._sites[site.name]
        if passed:
            self._moved[site.name] = site
            for call in () if site.tail else site.executions:
                if call.output is not None:
                    self._moved_calls[call.output] = call
        for call, before, after in self._ends(site):
            self._joins[id(call.region)].join(before, after)
        self._given |= {absorber.path for absorber in absorbers if absorber.gives_bias}
        for absorber in absorbers:
            if absorber.normalization:
                self._change(self._sites[absorber.path], absorber, self._numbers(site))

    def check(self, site: NormSite) -> None:
        """Whether all of `site` is one affine that is seen, so that it can be moved or replaced.

        Raises:
            Unsupported: it is not; the message says why.
        """
        if not site.has_fixed_affine:
            raise Unsupported(
                "has no running statistics, so it depends on the batch in eval mode too"
            )
        self.check_seen(site)
        norm = self._model.get_submodule(site.name)
        for call in site.executions:
            check_hooks(norm, call)

    def check_seen(self, site: NormSite) -> None:
        """Whether all that reads the parameters of `site` is one of its calls in the graphs.

        Raises:
            Unsupported: it is not.
        """
        if site.why_not is not None:
            raise Unsupported(site.why_not)
        if self._seen.how == "module tree":
            raise Unsupported("the dataflow is unknown; give example inputs")
        if self._seen.called_outside.intersection(site.paths):
            raise Unsupported("is called where its dataflow could not be captured")
        if not site.executions:
            raise Unsupported(
                "is never called with these inputs" if site.calls == 0 else "could not be captured"
            )
        norm = self._model.get_submodule(site.name)
        inside = {node for call in site.executions for node in call.nodes}
        self._owners.check_reads(site.name, dict(own_tensors(norm)), inside)

    # --- a captured graph -------------------------------------------------------------------------

    def _absorbers(self, site: NormSite, *, early: bool, inverse: bool) -> tuple[Absorber, ...]:
        outputs = ((self._operators.output(call), call) for call in site.executions)
        own = {node: call.input for node, call in outputs if node is not None}
        seeds, numbers = self._seeds(site, early), self._numbers(site)
        dropped = early and self._shift_is_dropped(site, numbers)
        return self.taken_up(
            seeds, own, numbers, early=early, inverse=inverse, shift_is_dropped=dropped
        )

    def _shift_is_dropped(self, site: NormSite, numbers: Numbers | None) -> bool:
        """Whether all that take the output of `site` compute the same without its shift."""
        for call in site.executions:
            output = self._operators.output(call)
            if output is None:
                return False
            channels = torch.arange(site.num_features or 0)
            layout = along(len(shape_of(output)), site.channel_axis, channels)
            shift = None if numbers is None else numbers.shift.cpu()
            if not all(drops_shift(user, layout, shift) for user in output.users):
                return False
        return True

    def taken_up(
        self,
        seeds: Mapping[fx.Node, Tensor],
        own: Mapping[fx.Node, fx.Node | None],
        numbers: Numbers | None,
        *,
        early: bool,
        inverse: bool = False,
        shift_is_dropped: bool = False,
        subtracts: Callable[[fx.Node], bool] = lambda _: False,
    ) -> tuple[Absorber, ...]:
        """The modules that can together absorb an affine.

        Args:
            seeds: the values that change, each with its layout.
            own: the operators that compute the affine now (see `Movement`).
            numbers: the affine, None where it will change.
            early: the affine is applied before its own place.
            inverse: some may take it back.
            shift_is_dropped: what follows computes the same without the shift.
            subtracts: layers that need no bias for the shift (see `Movement`).

        Raises:
            Unsupported: it cannot be absorbed exactly; the message says what stops it.
        """
        movement = Movement(
            self._operators,
            own,
            early,
            inverse,
            self._context,
            self._owners.region,
            lambda each: each.name in self._moved,
            self._adjusts,
            subtracts,
        )
        known = dict(seeds)
        if inverse and len(seeds) == 1:
            self._spread(movement, known)
        else:
            movement.spread(known)
        absorbing, shifts, positive = movement.settle(
            known,
            frozenset(seeds),
            no_shift=shift_is_dropped or (numbers is not None and not bool(numbers.shift.any())),
            has_bias=lambda each: subtracts(each.node) or self._has_bias(each),
        )
        for layout in positive:
            _check_positive(numbers, layout)
        found: dict[Absorber, set[fx.Node]] = {}
        for each in absorbing:
            absorber = self._absorber(each, shifts[each.value], (each.side == "in") == early)
            found.setdefault(absorber, set()).update(each.reads)
        self._check_all_reads(found)
        return tuple(replace(absorber, nodes=tuple(nodes)) for absorber, nodes in found.items())

    def _spread(self, movement: Movement, known: dict[fx.Node, Tensor]) -> None:
        """`Movement.spread` of one value, remembering where it was stopped."""
        ((value, layout),) = known.items()
        before, stopped = self._stopped.get((value, movement.early), (None, None))
        if stopped is not None and before is not None and torch.equal(before, layout):
            raise stopped
        try:
            movement.spread(known)
        except Stopped as reason:
            self._stopped |= {(v, movement.early): (known[v], reason) for v in known}
            raise

    def _ends(self, site: NormSite) -> Iterator[tuple[Call, fx.Node, fx.Node]]:
        """Of each call what it normalizes, and the normalized value."""
        for call in site.executions:
            after = call.output if call.region.symbolic else self._operators.output(call)
            if call.input is not None and after is not None:
                yield call, call.input, after

    def _seeds(self, site: NormSite, early: bool) -> dict[fx.Node, Tensor]:
        seeds = {}
        for call in site.executions:
            value = call.input if early else self._operators.output(call)
            if value is None:
                raise Unsupported("takes more than one value" if early else "returns no one value")
            rank = len(shape_of(value))
            if site.num_features is None or not -rank <= site.channel_axis < rank:
                raise Unsupported("normalizes a value without that axis")
            seeds[value] = along(rank, site.channel_axis, torch.arange(site.num_features))
        return seeds

    def _absorber(self, each: Absorbing, shift: float, inverse: bool) -> Absorber:
        call = self._operators.calls.get(each.node)
        if call is not None:
            slots = each.slots
            return Absorber(
                call[0].name, "weight", "bias", False, each.side, slots, slots, shift, inverse, True
            )
        if each.weight is each.value:
            region = self._owners.region(each.node)
            path, name = self._owners.of(region, region.module_path(each.node), each.weight)
            return Absorber(path, name, None, False, "value", each.slots, None, shift, inverse)
        path, weight, bias, gives = self._owners.weight_and_bias(each)
        gives = gives and path not in self._given
        if not shift and (gives or each.side == "in"):
            bias, gives = None, False
        return Absorber(
            path, weight, bias, gives, each.side, each.slots, each.bias_slots, shift, inverse
        )

    def _has_bias(self, each: Absorbing) -> bool:
        """Whether a shift can be added where `each` absorbs."""
        if each.node in self._operators.calls or each.weight is each.value:
            return True
        return self._owners.weight_and_bias(each)[2] is not None

    def _check_all_reads(self, found: dict[Absorber, set[fx.Node]]) -> None:
        uses: dict[tuple[str, str], int] = {}
        for absorber in found:
            key = absorber.path, f"{absorber.weight} {absorber.side}"
            uses[key] = uses.get(key, 0) + 1
            if uses[key] > 1:
                raise Unsupported(f"{absorber.path} would have to absorb it in two ways")
        for absorber, nodes in found.items():
            if absorber.normalization:
                calls = self._operators.calls
                nodes = {n for node in nodes for n in calls[node][1].nodes}
            elif absorber.side == "value":  # the movement has followed whoever reads it
                nodes = {user for node in nodes for user in node.users}
            names = [name for name in (absorber.weight, absorber.bias) if name is not None]
            self._owners.check_reads(absorber.path, names, nodes)

    # --- numbers ----------------------------------------------------------------------------------

    def _adjusts(self, site: NormSite) -> bool:
        """Whether `site` is a BatchNorm that can take up the affine of another."""
        if not self._fixed or not site.has_fixed_affine or site.why_not:
            return False
        norm = self._model.get_submodule(site.name)
        return numbers_of(norm) is not None and not norm._forward_pre_hooks

    def _numbers(self, site: NormSite) -> Numbers | None:
        if not self._fixed:
            return None
        if site.name in self._changed:
            return self._changed[site.name]
        return numbers_of(self._model.get_submodule(site.name))

    def _change(self, norm: NormSite, absorber: Absorber, other: Numbers | None) -> None:
        own = self._numbers(norm)
        assert absorber.slots.channels is not None
        self._changed[norm.name] = (
            None
            if own is None or other is None
            else own.with_another(
                other,
                torch.tensor(absorber.slots.channels),
                before=absorber.side == "in",
                inverse=absorber.inverse,
                times=absorber.shift,
            )
        )

    # --- a symbolic trace -------------------------------------------------------------------------

    def _symbolic(self, site: NormSite) -> tuple[Absorber, ...]:
        found: dict[Absorber, set[fx.Node]] = {}
        for call in site.executions:
            node, path = producer(
                self._model, call, self._moved_calls, training=self._context.training
            )
            absorber = absorber_of(self._model.get_submodule(path), path, path in self._given)
            found.setdefault(absorber, set()).add(node)
        self._check_all_reads(found)
        return tuple(found)


def _check_positive(numbers: Numbers | None, layout: Tensor) -> None:
    channels = layout[layout != NONE]
    if numbers is None or not bool((numbers.scale[channels] > 0).all()):
        raise Unsupported("a maximum lies between them, which only a positive scale commutes with")
