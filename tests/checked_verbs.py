"""What must hold of any network whatever is done to it, as a list of faults, the worst first named.

A refusal (NormswapError, one line) is no fault. Everything is compared with the unmodified network
in float64: on the example, with every other choice of an argument or attribute, at another size,
with gradients and without.
"""

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from random import Random
from typing import Any, NamedTuple

import torch
from networks_as_source import Call, Network
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.graph.copies import copied

TOLERANCE = 1e-9
Outputs = list[Tensor]


class Fault(NamedTuple):
    """What `verb` does wrong: `kind` tells kinds apart, `detail` is for a person."""

    verb: str
    kind: str
    detail: str


# --- verbs ----------------------------------------------------------------------------------------

Verb = Callable[[nn.Module, Any], nn.Module]


def _looked_at(model: nn.Module, inputs: Any) -> nn.Module:
    ns.inspect(model, inputs)
    return model


def _through_json(model: nn.Module, inputs: Any) -> nn.Module:
    plan = ns.plan(model, ns.Fold(), inputs=inputs)
    return ns.Plan.from_json(plan.to_json()).apply(model, inputs=inputs)


def _decided_without_inputs(model: nn.Module, inputs: Any) -> nn.Module:
    return ns.plan(model, ns.Fold()).apply(model, inputs=inputs)  # which alone would be unchecked


def _frozen_first(model: nn.Module, inputs: Any) -> nn.Module:
    return ns.fold(ns.convert(model, "frozen_batch_norm", inputs=inputs), inputs)


def _twice(model: nn.Module, inputs: Any) -> nn.Module:
    return ns.fold(ns.fold(model, inputs), inputs)


SAME: dict[str, Verb] = {
    "inspect": _looked_at,
    "fold": ns.fold,
    "fold, duplicate": lambda model, inputs: ns.fold(model, inputs, duplicate=True),
    "fold, channels_last": lambda model, inputs: ns.fold(model, inputs, channels_last=True),
    "fold, in place": lambda model, inputs: ns.fold(copied(model), inputs, inplace=True),
    "fold, no inputs": _decided_without_inputs,
    "fold, JSON": _through_json,
    "fold, twice": _twice,
    "fold, frozen": _frozen_first,
    "freeze": ns.freeze,
    "tune": lambda model, inputs: ns.freeze(model, inputs, mode="tune"),
    "tune, bake": lambda model, inputs: ns.bake(ns.freeze(model, inputs, mode="tune"), inputs),
    "tune, unfreeze": lambda model, inputs: ns.unfreeze(ns.freeze(model, inputs, mode="tune")),
    "center": ns.center,
    "fold_gains": ns.fold_gains,
    "rescale": lambda model, inputs: ns.rescale(model, inputs, [inputs], limit=1.0),
    "rotate": lambda model, inputs: ns.rotate(model, inputs, heads=True),
    "weight_norm": lambda model, inputs: ns.parametrize(model, "weight_norm", inputs=inputs),
}
CALLED: dict[str, Verb] = {}
for _name, _method in ns.methods().items():
    if _method.kind == "activation" and _name not in ("sync_batch_norm", "identity"):
        (SAME if _method.keeps == "exact" else CALLED)[_name] = lambda model, inputs, to=_name: (
            ns.convert(model, to, inputs=inputs)
        )
# A list of examples: what holds must hold for all of them.
SEVERAL = "fold, several"
# A plan made on one state of the network, applied to another.
STALE = "fold, trained since"
VERBS = (*SAME, SEVERAL, STALE, *CALLED)
# The fold with its variants is what most can go wrong with.
OFTEN = ("fold", "fold", "fold, duplicate", "tune", "tune", SEVERAL, STALE, "frozen_batch_norm")


# --- what is compared -----------------------------------------------------------------------------


def leaves(output: Any) -> Outputs:
    """The tensors of an output, also of a dataclass that torch does not know."""
    if is_dataclass(output):
        output = vars(output)
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def run(model: nn.Module, call: Call, *, grad: bool) -> Outputs:
    """The outputs of one call in the model's present mode; its attributes end as they were."""
    before = {name: getattr(model, name) for name in call.attributes}
    args, kwargs = _pytree.tree_map_only(Tensor, Tensor.clone, (call.args, call.kwargs))
    try:
        vars(model).update(call.attributes)
        with torch.set_grad_enabled(grad):
            return leaves(model(*args, **kwargs))
    finally:
        vars(model).update(before)


def deviation(actual: Outputs, expected: Outputs) -> float:
    """The largest difference, relative to the largest value of each output."""
    if [each.shape for each in actual] != [each.shape for each in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if b.numel() and not torch.equal(a, b):
            off = (a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-3)
            worst = max(worst, float(off.nan_to_num(nan=float("inf"))))
    return worst


def gradients(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """Of a weighted sum of the outputs, by the names that parameters have without tune mode."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for output in run(model, call, grad=True):
        total = total + (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()
    if total.requires_grad:
        total.backward()
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.grad is not None:
            plain = name.replace("parametrizations.", "").replace(".original", "")
            found[plain] = parameter.grad.clone()
    model.zero_grad()
    return found


def state(model: nn.Module) -> list[Any]:
    """All of a model that looking at it must not change, and the state of the generator."""
    found: list[Any] = [torch.get_rng_state()]
    for path, module in model.named_modules(remove_duplicate=False):
        hooks = [len(held) for name, held in vars(module).items() if name.endswith("_hooks")]
        found.append((path, type(module), module.training, sorted(vars(module)), hooks))
    for name, tensor in model.state_dict(keep_vars=True).items():
        found += [name, id(tensor), tensor.requires_grad, tensor.detach().clone()]
    return found


def equal(before: Sequence[Any], after: Sequence[Any]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


def trained(model: nn.Module) -> nn.Module:
    """The same network after some training: gains of any sign, zeros among them, new statistics."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.requires_grad | ("running" in name):
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise.abs() + 0.1 if name.endswith("var") else noise)
    return model


# --- faults ---------------------------------------------------------------------------------------


class Expected:
    """The unmodified network, and what each call of it gives."""

    def __init__(self, model: nn.Module, network: Network) -> None:
        self.model, self.outputs = model.eval(), dict[tuple[str, bool], Outputs]()
        self.calls = list(network.calls())
        for call in self.calls:
            for grad in (False, True):
                try:
                    found = run(self.model, call, grad=grad)
                    finite = all(each.isfinite().all() for each in found)
                except Exception:  # torch does not run it, so nothing else has to
                    continue
                if finite:
                    self.outputs[call.name, grad] = found

    @property
    def runs(self) -> bool:
        return ("example", False) in self.outputs and ("example", True) in self.outputs

    def faults(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """The kinds and details of what a model does differently."""
        for call in self.calls:
            for grad in (False, True):
                if (call.name, grad) not in self.outputs:
                    continue
                other = "" if call.name == "example" else f", {self._group(call.name)}"
                where = f"{call.name}, {'with' if grad else 'without'} gradients"
                try:
                    off = deviation(run(model, call, grad=grad), self.outputs[call.name, grad])
                except Exception as error:
                    yield f"cannot run{other}", f"{where}: {type(error).__name__}: {error}"
                    return
                if off > TOLERANCE:
                    yield f"deviation{other}", f"{off:.2g}, {where}"
                    return

    @staticmethod
    def _group(name: str) -> str:
        return name if name == "other size" else "other choice"


def faults(network: Network, verbs: Sequence[str] = VERBS) -> Iterator[Fault]:
    """All faults of these verbs; none where torch itself cannot run the network."""
    expected = Expected(network.build(), network)
    if not expected.runs:
        return
    model = network.build().train(network.seed % 2 == 0)
    for verb in verbs:
        before, result = state(model), None
        try:
            result = _rewritten(verb, model, network, expected)
        except NormswapError as refusal:
            if "\n" in str(refusal) or not 10 < len(str(refusal)) < 600:
                yield Fault(verb, "refusal is not one line", str(refusal))
        except Exception as error:
            yield Fault(verb, f"crash: {type(error).__name__}", str(error)[:300])
        if not equal(before, state(model)):
            yield Fault(verb, "changed the original, or the random generator", "")
            model = network.build().train(model.training)
        if result is None:
            continue
        if result.training != model.training:
            yield Fault(verb, "mode of the result", "")
        beside = expected
        if verb == STALE:
            beside = Expected(trained(network.build()), network)
            if not beside.runs:
                continue
        yield from (Fault(verb, *each) for each in _differences(verb, result.eval(), beside))
        model.train(network.seed % 2 == 0)  # which the result is, if it was only looked at


def _rewritten(verb: str, model: nn.Module, network: Network, expected: Expected) -> nn.Module:
    example = network.inputs_like(expected.calls[0])
    if verb == STALE:
        plan = ns.plan(model, ns.Fold(), inputs=example)
        return plan.apply(trained(network.build()).train(model.training))
    if verb == SEVERAL:
        runs = [call for call in expected.calls if (call.name, False) in expected.outputs]
        chosen = replace(network, example="all")
        return ns.fold(model, [chosen.inputs_like(each) for each in runs if not each.attributes])
    return (SAME | CALLED)[verb](model, example)


def _differences(verb: str, result: nn.Module, expected: Expected) -> Iterator[tuple[str, str]]:
    wrong = list(_uncalled(result, expected) if verb in CALLED else expected.faults(result))
    yield from wrong
    if not wrong and verb == "tune":
        yield from _gradient_faults(result, expected)
    if not wrong:
        yield from _copy_faults(result, expected)


def _uncalled(result: nn.Module, expected: Expected) -> Iterator[tuple[str, str]]:
    """Modules that were put in must be called as often as what they replace."""
    ours = [path for path, m in result.named_modules() if type(m).__module__.startswith("normswap")]
    held = dict(expected.model.named_modules())
    for grad in (False, True):
        counts = []
        for model in (expected.model, result):
            calls = dict.fromkeys((path for path in ours if path in held), 0)
            handles = []
            for path in calls:

                def count(*_: Any, path: str = path, calls: dict[str, int] = calls) -> None:
                    calls[path] += 1

                handles.append(model.get_submodule(path).register_forward_pre_hook(count))
            try:
                run(model, expected.calls[0], grad=grad)
            except Exception as error:
                yield "cannot run", f"{type(error).__name__}: {error}"
                return
            finally:
                for handle in handles:
                    handle.remove()
            counts.append(calls)
        if counts[0] != counts[1]:
            yield "not called", f"{counts[0]} became {counts[1]}"


def _gradient_faults(result: nn.Module, expected: Expected) -> Iterator[tuple[str, str]]:
    try:
        wanted = gradients(expected.model, expected.calls[0])
    except RuntimeError:  # it writes into what its own backward needs
        return
    found = gradients(result, expected.calls[0])
    most = max((float(each.abs().max()) for each in wanted.values()), default=0.0)
    for name, gradient in wanted.items():
        if name not in found:
            if gradient.any():
                yield "gradient missing", name
        elif float((found[name] - gradient).abs().max()) > 1e-8 * most:
            yield "gradient", name


def _copy_faults(result: nn.Module, expected: Expected) -> Iterator[tuple[str, str]]:
    """A result is copied and pickled where the original is, and stays what it was."""
    call = expected.calls[0]
    wanted = run(result, call, grad=False)
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    }
    for name, way in ways.items():
        try:
            way(expected.model)
        except Exception:
            continue
        if name == "pickle" and any(map(parametrize.is_parametrized, result.modules())):
            continue  # torch refuses it
        try:
            off = deviation(run(way(result), call, grad=False), wanted)
        except Exception as error:
            yield f"{name} of the result", f"{type(error).__name__}: {error}"
            continue
        if off > TOLERANCE:
            yield f"{name} of the result", f"deviation {off:.2g}"


def drawn_verbs(seed: int) -> list[str]:
    """Those to check on the network of a seed: one that much can go wrong with, and any other."""
    random = Random(seed)
    return list(dict.fromkeys([random.choice(OFTEN), random.choice(VERBS)]))


def shrunk(network: Network, fault: Fault, tries: int = 200) -> tuple[Network, Fault]:
    """The smallest network found that has the same kind of fault."""
    again = True
    while again:
        again = False
        for smaller in network.smaller():
            if (tries := tries - 1) < 0:
                return network, fault
            try:
                found = [e for e in faults(smaller, [fault.verb]) if e.kind == fault.kind]
            except Exception:  # it cannot be built
                continue
            if found:
                network, fault, again = smaller, found[0], True
                break
    return network, fault
