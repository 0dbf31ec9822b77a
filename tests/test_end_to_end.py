"""Random networks through every verb: what comes out computes the same, or a reason is given.

The environment variable NORMSWAP_EXAMPLES multiplies the number of examples, which are random then;
those of the suite are always the same.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from random_networks import Network, Spec, specs
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree

import normswap as ns
from normswap.core.errors import NormswapError

TIMES = int(os.environ.get("NORMSWAP_EXAMPLES", "1"))
METHODS = [name for name, method in ns.methods().items() if method.kind == "activation"]
WEIGHT_METHODS = [name for name, method in ns.methods().items() if method.kind == "weight"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def some(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """In eval mode; the flags end as they began."""
    flags = [(module, module.training) for module in model.modules()]
    args, kwargs = _pytree.tree_map_only(Tensor, Tensor.clone, as_call(inputs))
    with torch.no_grad():
        found = _pytree.tree_leaves(model.eval()(*args, **kwargs))
    for module, training in flags:
        module.training = training
    return [each.clone() for each in found]


def apart(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest deviation, relative to the largest value of each output."""
    assert len(actual) == len(expected)
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.double(), b.double()
        assert torch.equal(a.isfinite(), b.isfinite())
        if b.numel():
            worst = max(
                worst, float(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).nan_to_num())
            )
    return worst


def attempt(verb: Callable[[], Any]) -> Any:
    """What the verb returns; None for a refusal, which is one line that says why."""
    try:
        return verb()
    except NormswapError as refusal:
        message = str(refusal)
        assert message.strip() and "\n" not in message and len(message) < 600, message
        event(message.split()[0])
        return None


class Untouched:
    """A model, which must be what it was when the block ends."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _look(self) -> Any:
        flags = [
            (path, type(module), module.training, *map(len, self._hooks(module)))
            for path, module in self.model.named_modules(remove_duplicate=False)
        ]
        needs = [
            (name, p.requires_grad, p.grad is None) for name, p in self.model.named_parameters()
        ]
        return flags, needs

    @staticmethod
    def _hooks(module: nn.Module) -> list[dict[Any, Any]]:
        return [value for name, value in vars(module).items() if name.endswith("_hooks")]

    def __enter__(self) -> None:
        self.seen, self.tensors = self._look(), list(self.model.state_dict(keep_vars=True).items())
        self.bits = [tensor.detach().clone() for _, tensor in self.tensors]
        self.random = torch.get_rng_state()

    def __exit__(self, *error: object) -> None:
        assert self._look() == self.seen
        now = list(self.model.state_dict(keep_vars=True).items())
        assert [name for name, _ in now] == [name for name, _ in self.tensors]
        for (name, tensor), (_, before), bits in zip(now, self.tensors, self.bits, strict=True):
            assert tensor is before, name
            assert torch.equal(tensor, bits), name
        assert torch.equal(torch.get_rng_state(), self.random)


def built(spec: Spec) -> tuple[Network, Any, list[Tensor]]:
    """The network, its inputs and outputs; only of networks that torch itself can run."""
    network, inputs = spec.build(), spec.sample()
    try:
        expected = outputs(network, inputs)
    except (RuntimeError, ValueError):  # a kernel that this dtype has not
        assume(False)
    assume(all(each.isfinite().all() for each in expected))
    return network, inputs, expected


# --- the same function ----------------------------------------------------------------------------


@some(20)
@given(specs())
def test_a_fold_computes_the_same(spec: Spec) -> None:
    network, inputs, expected = built(spec)
    with Untouched(network):
        folded = attempt(lambda: ns.fold(network, inputs))
    if folded is None:
        return
    assert apart(outputs(folded, inputs), expected) <= 1e-10
    for samples in (1, 4):
        other = spec.sample(samples)
        try:
            wanted = outputs(network, other)
        except ValueError:  # statistics of a batch of one value
            continue
        assert apart(outputs(folded, other), wanted) <= 1e-10
    again = attempt(lambda: ns.fold(copy.deepcopy(folded), inputs, inplace=True))
    if again is not None:
        assert apart(outputs(again, inputs), expected) <= 1e-10


@some(20)
@given(specs())
def test_tune_mode_has_the_function_and_gradients_of_eval_mode(spec: Spec) -> None:
    network, inputs, expected = built(spec)
    with Untouched(network):
        tuned = attempt(lambda: ns.freeze(network, inputs, mode="tune"))
    if tuned is None:
        return
    assert apart(outputs(tuned, inputs), expected) <= 1e-10
    try:
        wanted = gradients(network.eval(), inputs)
    except RuntimeError:  # it writes into what its own backward needs
        return
    found = gradients(tuned.eval(), inputs)
    for name, gradient in wanted.items():
        assert name in found, name
        scale = max(float(gradient.abs().max()), 1e-3 * max(map(largest, wanted.values())), 1e-12)
        assert float((found[name] - gradient).abs().max()) <= 1e-8 * scale, name
    baked = ns.bake(tuned)
    assert not any(parametrize.is_parametrized(module) for module in baked.modules())
    assert apart(outputs(baked, inputs), expected) <= 1e-10
    thawed = ns.unfreeze(tuned)
    assert apart(outputs(thawed, inputs), expected) <= 1e-10
    if not any(options.get("functional") for options in spec.options()):  # those got a module
        assert set(thawed.state_dict()) == set(network.state_dict())


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Of a sum of the outputs with fixed factors, in the model's present mode, by plain names."""
    model.zero_grad()
    args, kwargs = _pytree.tree_map_only(Tensor, Tensor.clone, as_call(inputs))
    total = torch.zeros((), dtype=torch.float64)
    for output in _pytree.tree_leaves(model(*args, **kwargs)):
        factors = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        total = total + (output * factors).sum()
    if not total.requires_grad:
        return {}
    total.backward()
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.grad is not None:
            found[plain(name)] = parameter.grad.clone()
    model.zero_grad()
    return found


def plain(name: str) -> str:
    """The name of a parameter without the affines that tune mode puts on it."""
    return name.replace("parametrizations.", "").removesuffix(".original")


@some(40)
@given(specs((torch.float64, *DTYPES)), st.sampled_from(METHODS), st.booleans())
def test_a_conversion_runs_trains_and_keeps_what_it_says(
    spec: Spec, method: str, given_inputs: bool
) -> None:
    network, inputs, expected = built(spec)
    shown = inputs if given_inputs else None
    with Untouched(network):
        converted = attempt(lambda: ns.convert(network, method, inputs=shown))
    if converted is None:
        return
    try:
        actual = outputs(converted, inputs)
    except (RuntimeError, ValueError) as error:  # without inputs nobody sees what a norm is given
        assert not given_inputs or "not implemented for" in str(error)
        return
    if ns.methods()[method].keeps == "exact" and spec.dtype is torch.float64:
        assert apart(actual, expected) <= 1e-10
    train_a_step(network, converted, inputs)


def train_a_step(network: nn.Module, changed: nn.Module, inputs: Any) -> None:
    """A step of the changed model, if the original can train."""
    for model in (network, changed):
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            return
        optimizer = torch.optim.SGD(parameters, 1e-3)
        try:
            gradients(model.train(), inputs)
            loss = torch.zeros(())
            args, kwargs = _pytree.tree_map_only(Tensor, Tensor.clone, as_call(inputs))
            for output in _pytree.tree_leaves(model(*args, **kwargs)):
                loss = loss + output.float().square().mean()
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
        except (RuntimeError, ValueError):
            if model is network:
                return
            raise


# --- the whole way --------------------------------------------------------------------------------

VERBS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "convert": lambda model, inputs: ns.convert(model, "group_norm", inputs=inputs),
    "frozen": lambda model, inputs: ns.convert(model, "frozen_batch_norm", inputs=inputs),
    "freeze": lambda model, inputs: ns.freeze(model, inputs),
    "tune": lambda model, inputs: ns.freeze(model, inputs, mode="tune"),
    "fold": lambda model, inputs: ns.fold(model, inputs),
    "fold, last": lambda model, inputs: ns.fold(model, inputs, channels_last=True),
    "fold, copies": lambda model, inputs: ns.fold(model, inputs, duplicate=True),
    "center": lambda model, inputs: ns.center(model, inputs),
    "unfreeze": lambda model, inputs: ns.unfreeze(model),
    "bake": lambda model, inputs: ns.bake(model),
    "weight_norm": lambda model, inputs: ns.parametrize(model, "weight_norm"),
    "train": lambda model, inputs: (train_a_step(model, model, inputs), model)[1],
}
CHANGES = ("convert", "train")


@some(20)
@given(specs(), st.lists(st.sampled_from(list(VERBS)), min_size=1, max_size=4))
def test_any_chain_of_verbs_keeps_the_function_and_can_be_saved(
    spec: Spec, verbs: list[str]
) -> None:
    model, inputs, expected = built(spec)
    for verb in verbs:
        before, flags = model, [module.training for module in model.modules()]
        if verb == "train":
            model = copy.deepcopy(model)
        after = attempt(lambda verb=verb, model=model: VERBS[verb](model, inputs))
        if after is None:
            continue
        model = after
        if verb in CHANGES:
            expected = outputs(model, inputs)
        else:
            assert [module.training for module in before.modules()] == flags
            assert apart(outputs(model, inputs), expected) <= 1e-9, verb
    with TemporaryDirectory() as folder:
        with Untouched(model):
            ns.save(model, Path(folder) / "saved")
        loaded = ns.load(Path(folder) / "saved", source=spec.build)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert apart(outputs(loaded, inputs), outputs(model, inputs)) == 0


@some(8)
@given(
    specs((torch.float32, torch.float64, torch.float16), most=7),
    st.sampled_from(list(VERBS)),
    st.booleans(),
)
def test_what_is_exported_computes_the_same(spec: Spec, verb: str, dynamic: bool) -> None:
    model, inputs, _ = built(spec)
    model = attempt(lambda: VERBS[verb](model, inputs)) or model
    with TemporaryDirectory() as folder, Untouched(model):
        path = Path(folder) / "model.onnx"
        report = attempt(lambda: ns.export(model, inputs, path, dynamic=dynamic))
        assert (report is None) == (not path.exists())
        if report is None:
            return
        assert report.passed, str(report)
        assert ns.validate(path, model, inputs).passed
