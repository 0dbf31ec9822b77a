"""Whether a result computes what its original does: both run on the examples, one beside the other.

What a plan says is decided on a captured graph. A forward that asks for a class, reads an attribute
of a module that is gone, or takes another way without gradients is in no graph, so the result is
run once on each example with gradients and once without, in eval mode:

1. It runs, and returns tensors of the same shapes and types as the original.
2. Where the plan is exact, they are the same to rounding: relative to the largest value of each, or
   else in float64, on copies of both.
3. Where it is not exact, they are the same as long as each module that was put in computes what was
   there before: nothing but the normalizations changed, and no forward asks what one is.
4. A module that was put in is called as often as what was there before.
5. What no edit names is as before: classes, flags, hooks, and the kinds of all tensors.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.ambient import alone
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError, first_line, warn
from normswap.core.interrupts import entered
from normswap.graph.exporting import Hidden, tensors_in
from normswap.graph.fused_paths import call_layer_norms
from normswap.graph.running import as_call
from normswap.graph.snapshot import contents_kept, untouched
from normswap.passes.edits import Edit, FoldIntoTensor, ModularizeNorm

# The deviation that passes at once; beyond it float64 is asked.
_AT_ONCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What passes in float64, and without it, where the model does not run in that.
_IN_FLOAT64 = 1e-6
_WITHOUT_FLOAT64 = {
    torch.float64: 1e-6,
    torch.float32: 1e-2,
    torch.float16: 0.1,
    torch.bfloat16: 0.3,
}
_AS_BEFORE = "though each new module computes what was there before"
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class Differs(NormswapError):
    """The result does not do what the original does.

    Attributes:
        deviation: max |a - b| / max |b| of the output where it is largest; None where outputs
            cannot be compared, or something else differs.
        dtype: of that output.
        suspects: paths of modules that are known to be at fault.
    """

    def __init__(
        self,
        what: str,
        *,
        deviation: float | None = None,
        dtype: torch.dtype | None = None,
        suspects: Iterable[str] = (),
    ) -> None:
        super().__init__(what)
        self.deviation, self.dtype, self.suspects = deviation, dtype, tuple(suspects)

    @property
    def may_be_rounding(self) -> bool:
        """Whether float64 could show that only rounding errors differ."""
        return self.deviation is not None

    @property
    def is_large(self) -> bool:
        """Whether it is more than rounding errors, as far as can be told without float64."""
        limit = _WITHOUT_FLOAT64.get(self.dtype or torch.float32, 1e-2)
        return self.deviation is None or not self.deviation <= limit


@dataclasses.dataclass(frozen=True)
class _Run:
    """What one forward returned, or raised, and how often it called some modules."""

    outputs: list[Tensor] | None
    error: Exception | None
    calls: Counter[str]


class Beside:
    """The original's side, taken before anything is changed; `check` holds a result against it.

    Args:
        edits: what will be done to it.
        exact: the result has to compute the same function in eval mode.
    """

    def __init__(
        self, model: nn.Module, edits: Sequence[Edit], examples: Sequence[Any], *, exact: bool
    ) -> None:
        self._edits, self._exact = edits, exact
        put_in = (edit.path for edit in edits if edit.is_called)
        # A functional call has no module yet, or a bare one that holds its tensors.
        owned = {edit.site for edit in edits if isinstance(edit, ModularizeNorm)}
        self._owns = bool(owned)
        modules = dict(model.named_modules(remove_duplicate=False))
        self._before_them = {p: modules[p] for p in put_in if p in modules and p not in owned}
        touched = _touched(model, _paths_in(model, edits))
        paths = {path for path, module in model.named_modules() if module not in touched}
        self._structure = {path: w for path, w in _structure(model).items() if path in paths}
        with _slow(model):
            pairs = [self._original(model, as_call(example)) for example in examples]
        self._calls = [call for call, _ in pairs]
        self._before = [runs for _, runs in pairs]

    def check(self, result: nn.Module) -> None:
        """Compare `result` with the original.

        Raises:
            Differs: it is not what the plan promises; the message says where. On an example on
                which the original itself does not run (an operator may be missing on this machine)
                nothing can be compared, and a warning says so.
        """
        after = _structure(result)
        self._paths = {id(module): path for path, module in result.named_modules()}
        for path, what in self._structure.items():
            if after.get(path) != what:
                raise Differs(
                    f"the plan changed {path or 'the model'}, which none of its edits names"
                )
        for given, runs in zip(self._calls, self._before, strict=True):
            errors = [run.error for run in runs if run.error is not None]
            if len(errors) == len(runs):
                why = first_line(errors[0])
                warn(
                    f"the result is unchecked: the model does not run on the inputs given ({why})",
                    stacklevel=2,
                )
                continue
            call = self._of_result(given)
            for before, now, mode in zip(
                runs, self._runs(result, call), ("with gradients", "without"), strict=True
            ):
                if before.error is None:
                    self._compare(before, now, runs[0].calls, mode, exact=self._exact)
            if not self._exact and not self._owns and runs[0].error is None and self._before_them:
                now = self._run(result, call, gradients=True, forwards=self._before_them)
                self._compare(runs[0], now, runs[0].calls, _AS_BEFORE, exact=True)

    def _original(self, model: nn.Module, call: _Call) -> tuple[_Call, list[_Run]]:
        """The runs of the original, and the arguments of these.

        A plan may be applied to a model that has been moved or cast since it was made.
        """
        moved = _as_parameters(model, call)
        runs = self._runs(model, moved)
        if any(run.error is None for run in runs):
            return moved, runs
        return call, self._runs(model, call)

    def _of_result(self, call: _Call) -> _Call:
        """The arguments that give the result what `call` gives the original."""
        given = (edit.numbers for edit in self._edits if isinstance(edit, FoldIntoTensor))
        affine = next(filter(None, given), None)
        return call if affine is None else affine.raw(call)

    def _compare(
        self, before: _Run, now: _Run, calls: Counter[str], mode: str, *, exact: bool
    ) -> None:
        if now.error is not None:
            raise Differs(
                f"the result does not run in eval mode {mode}: {first_line(now.error)}",
                suspects=self._suspects(now.error),
            ) from now.error
        assert before.outputs is not None and now.outputs is not None
        kinds = (
            [(a.shape, a.dtype) for a in before.outputs],
            [(a.shape, a.dtype) for a in now.outputs],
        )
        worst, dtype = 0.0, None
        if kinds[0] != kinds[1]:
            if not exact or [d for _, d in kinds[0]] != [d for _, d in kinds[1]]:
                raise Differs("the result returns other kinds of tensors than the model")
            worst, dtype = float("inf"), torch.float32  # how many a detector finds may be rounding
        elif exact:
            for expected, actual in zip(before.outputs, now.outputs, strict=True):
                deviation = _deviation(actual, expected)
                if not deviation <= worst:
                    worst, dtype = deviation, expected.dtype
        for path in self._before_them:
            if now.calls[path] != calls[path]:
                raise Differs(
                    f"{path} is called {now.calls[path]} times in eval mode {mode}, and what was "
                    f"there before {calls[path]} times: something reads it instead of calling it",
                    suspects=[path],
                )
        if dtype is not None and not worst <= _AT_ONCE.get(dtype, 1e-4):
            raise Differs(
                f"the outputs in eval mode {mode} differ by {worst:.2g} of the largest value: the "
                "forward asks what its normalizations are, or hides from the capture what it does",
                deviation=worst,
                dtype=dtype,
            )

    def _suspects(self, error: BaseException) -> list[str]:
        """The module whose own code raised `error`: the innermost that is not torch's."""
        found: list[str] = []
        trace = error.__traceback__
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            own = not type(module).__module__.startswith("torch.")
            if isinstance(module, nn.Module) and own:
                found += [path for path in [self._paths.get(id(module))] if path is not None]
            trace = trace.tb_next
        return found[-1:]

    def _runs(self, model: nn.Module, call: _Call) -> list[_Run]:
        """One forward with gradients, and one without."""
        return [self._run(model, call, gradients=gradients) for gradients in (True, False)]

    def _run(
        self,
        model: nn.Module,
        call: _Call,
        *,
        gradients: bool,
        forwards: Mapping[str, nn.Module] | None = None,
    ) -> _Run:
        """One forward in eval mode, which leaves no trace.

        Args:
            forwards: modules whose forward those at these paths compute meanwhile.
        """
        calls: Counter[str] = Counter()
        # All at once: a mode around each would be as many around each operator.
        all_of_them = nn.ModuleList([model, *(forwards or {}).values()])
        with (
            alone(),  # the random number generators have to be as they are seeded
            entered(torch.set_grad_enabled(gradients)),
            untouched(all_of_them, training=False),
            contents_kept(all_of_them),
        ):
            for path, other in (forwards or {}).items():
                vars(model.get_submodule(path))["forward"] = other.forward
            _count(model, self._before_them, calls)
            torch.manual_seed(0)
            args, kwargs = pytree.tree_map_only(Tensor, _copy, call)
            try:
                output = model(*args, **kwargs)
                return _Run([each.detach().clone() for each in _returned(output)], None, calls)
            except Exception as error:
                return _Run(None, error, calls)


def agrees_in_float64(
    model: nn.Module,
    apply: Callable[[nn.Module], None],
    edits: Sequence[Edit],
    examples: Sequence[Any],
    *,
    exact: bool,
) -> bool | None:
    """Whether the edits keep the function of a copy of `model` in float64.

    Args:
        model: a copy, which is changed.
        exact: as of `Beside`.

    Returns:
        None where it does not run in float64.
    """
    try:
        model.double()
        wide = [_double(example) for example in examples]
        beside = Beside(model, edits, wide, exact=exact)
    except Exception:
        return None
    try:
        apply(model)
        beside.check(model)
    except Differs as fault:
        return fault.deviation is not None and fault.deviation <= _IN_FLOAT64
    except Exception:
        return None
    return True


def _returned(output: Any) -> list[Tensor]:
    """The tensors in what a model returns, as far as they can be seen."""
    try:
        return tensors_in(output)
    except Hidden:
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _as_parameters(model: nn.Module, call: _Call) -> _Call:
    """The arguments on the device, and of the floating-point type, of the model's parameters."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return call

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    args, kwargs = pytree.tree_map_only(Tensor, moved, call)
    return args, kwargs


def _copy(tensor: Tensor) -> Tensor:
    # A forward may write into its input, which must then not be a leaf that records gradients.
    return tensor.detach().clone()


def _double(example: Any) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda each: each.double() if each.is_floating_point() else each, example
    )


def _deviation(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|; infinite where one is finite and the other is not."""
    if not expected.is_floating_point() or not expected.numel():
        return 0.0
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("inf")
    difference = torch.where(finite, actual - expected, 0.0).abs().max()
    largest = torch.where(finite, expected, 0.0).abs().max()
    return float(difference / largest.clamp_min(torch.finfo(torch.float32).tiny))


def _count(model: nn.Module, paths: Iterable[str], calls: Counter[str]) -> None:
    """Let the modules at `paths` count their calls, until `untouched` undoes it.

    No hooks: torch's layers take no fused path where there is one, and are to be seen as they are.
    """
    for path in paths:
        module = model.get_submodule(path)
        vars(module)["forward"] = partial(_counting, module.forward, path, calls)


def _counting(
    forward: Callable[..., Any], path: str, calls: Counter[str], *args: Any, **kwargs: Any
) -> Any:
    calls[path] += 1
    return forward(*args, **kwargs)


@contextmanager
def _slow(model: nn.Module) -> Iterator[None]:
    """Inside, every LayerNorm of `model` is called where its function is computed."""
    with untouched(model):
        call_layer_norms(model)
        yield


def _paths_in(model: nn.Module, edits: Iterable[Edit]) -> set[str]:
    """The paths of modules that `edits` name, in whatever field."""
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    found = set()
    for edit in edits:
        under = f"{edit.path}." if edit.path else ""
        texts = {text for text in pytree.tree_leaves(edit.model_dump()) if isinstance(text, str)}
        found |= paths & (texts | {f"{under}{text}" for text in texts})
    return found


def _touched(model: nn.Module, named: set[str]) -> set[nn.Module]:
    """The modules at the paths that are named, and all that lies in them."""
    return {
        each
        for path in named
        for each in (model.get_submodule(path).modules() if path else [model])
    }


def _structure(model: nn.Module) -> dict[str, Any]:
    """What each module is, by path."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # whose class a copy has made anew
        tensors = [
            (name, None if each is None else (each.shape, each.dtype, each.requires_grad))
            for held in (module._parameters, module._buffers)
            for name, each in held.items()
        ]
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[path] = type(module).__name__, module.training, tensors, hooks
    return found
