"""Whether a result computes what its original does: both run on the examples, one beside the other.

What a plan says is decided on a captured graph. A forward that asks for a class, reads an attribute
of a module that is gone, or takes another way without gradients is in no graph, so the result is
run once on each example with gradients and once without, in eval mode:

1. It runs, and returns tensors of the same shapes and types as the original.
2. Where the plan is exact, they are the same to rounding, and to what its edits say that they move
   the outputs by: relative to the largest value of each, or else in float64, on copies of both.
3. Where it is not exact, they are the same as long as each module that was put in computes what was
   there before: nothing but the normalizations changed, and no forward asks what one is.
4. A module that was put in is called as often as what was there before.
5. What no edit names is as before: classes, flags, hooks, and the kinds of all tensors.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from normswap.core.compat import pytree
from normswap.core.errors import NormswapError, first_line, warn
from normswap.graph.fused_paths import call_layer_norms
from normswap.graph.running import as_call
from normswap.graph.snapshot import untouched
from normswap.passes.edits import Edit, FoldIntoTensor, ModularizeNorm
from normswap.passes.edits.modules import promised
from normswap.passes.runs import (
    Call,
    Run,
    as_parameters,
    deviation,
    in_double,
    largest_rounding,
    run,
)

# The deviation that passes at once; beyond it float64 is asked.
_AT_ONCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What passes in float64.
_IN_FLOAT64 = 1e-6
_AS_BEFORE = "though each new module computes what was there before"


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
        limit = largest_rounding(self.dtype or torch.float32)
        return self.deviation is None or not self.deviation <= limit


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
                now = run(
                    result,
                    call,
                    gradients=True,
                    counted=self._before_them,
                    forwards=self._before_them,
                )
                self._compare(runs[0], now, runs[0].calls, _AS_BEFORE, exact=True)

    def _original(self, model: nn.Module, call: Call) -> tuple[Call, list[Run]]:
        """The runs of the original, and the arguments of these.

        A plan may be applied to a model that has been moved or cast since it was made.
        """
        moved = as_parameters(model, call)
        runs = self._runs(model, moved)
        if any(run.error is None for run in runs):
            return moved, runs
        return call, self._runs(model, call)

    def _of_result(self, call: Call) -> Call:
        """The arguments that give the result what `call` gives the original."""
        given = (edit.numbers for edit in self._edits if isinstance(edit, FoldIntoTensor))
        affine = next(filter(None, given), None)
        return call if affine is None else affine.raw(call)

    def _compare(
        self, before: Run, now: Run, calls: Counter[str], mode: str, *, exact: bool
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
            before_kinds, now_kinds = ([(len(s), d) for s, d in each] for each in kinds)
            if before_kinds != now_kinds:
                raise Differs("the result returns other kinds of tensors than the model")
            if exact:  # how many a detector finds may be rounding; a swap finds others
                worst, dtype = float("inf"), torch.float32
        elif exact:
            for expected, actual in zip(before.outputs, now.outputs, strict=True):
                moved = deviation(actual, expected)
                if not moved <= worst:
                    worst, dtype = moved, expected.dtype
        for path in self._before_them:
            if now.calls[path] != calls[path]:
                raise Differs(
                    f"{path} is called {now.calls[path]} times in eval mode {mode}, and what was "
                    f"there before {calls[path]} times: something reads it instead of calling it",
                    suspects=[path],
                )
        promise = promised(self._edits)
        if dtype is not None and not worst <= _AT_ONCE.get(dtype, 1e-4) + promise:
            measured = f", where the plan measured {promise:.2g}" if promise else ""
            raise Differs(
                f"the outputs in eval mode {mode} differ by {worst:.2g} of the largest value"
                f"{measured}: the forward asks what its normalizations are, or hides from the "
                "capture what it does",
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

    def _runs(self, model: nn.Module, call: Call) -> list[Run]:
        """One forward with gradients, and one without."""
        return [
            run(model, call, gradients=gradients, counted=self._before_them)
            for gradients in (True, False)
        ]


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
        wide = [in_double(example) for example in examples]
        beside = Beside(model, edits, wide, exact=exact)
    except Exception:
        return None
    try:
        apply(model)
        beside.check(model)
    except Differs as fault:
        return fault.deviation is not None and fault.deviation <= _IN_FLOAT64 + promised(edits)
    except Exception:
        return None
    return True


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
