"""Find the rate of a run by a few steps at its start.

How far a step may go depends on the network and on how far the student is from its teacher. So some
rates, each a quarter of the next, are tried on the first batches, each from the same weights for a
few steps in half a cosine, and the one after which the student is nearest to the teacher on the
held-back batches is taken. The usual rate comes first; from there the search goes on in the
direction in which it gets better, as long as it does.

A few steps on batches of one or two samples tell little: they bring the student no nearer at any
rate, and the least rate moves it least. A whole run averages that noise as its rate falls. Where no
rate brought the student clearly nearer, the largest that did not take it far away is taken.
"""

from collections.abc import Callable, Iterable
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from normswap.core.modes import flags_kept
from normswap.fit.batch import backward
from normswap.fit.checkpoints import model_tensors
from normswap.fit.learn import gradients_kept
from normswap.fit.schedules import cosine

STEPS = 8  # at most
SHARE = 6  # of a run; three or four rates together take half of it
FACTOR = 4.0
_FURTHEST = 3  # times that factor
_NEARER, _NOT_FAR = 0.95, 1.2  # of the distance at the start


def found_rate(usual: float, start: float, tried: Callable[[float], float]) -> float:
    """The rate, the `usual` one times a power of `FACTOR`, of which the outcome is least.

    Args:
        start: the distance before the first step.
        tried: gives the outcome of a rate, the distance after some.
    """
    outcomes = {usual: tried(usual)}
    best = usual
    for factor in (1 / FACTOR, FACTOR):
        for _ in range(_FURTHEST):
            rate = best * factor
            outcomes[rate] = tried(rate)
            if not outcomes[rate] < outcomes[best]:
                break
            best = rate
        if best != usual:
            break
    if outcomes[best] < _NEARER * start:
        return best
    return max((r for r in outcomes if outcomes[r] <= _NOT_FAR * start), default=best)


def probe_steps(steps: int) -> int:
    """For how many steps a rate is tried for a run of `steps`; 0 where that says nothing."""
    tried = min(STEPS, steps // SHARE)
    return tried if tried > 1 else 0


def outcome(
    model: nn.Module,
    objective: Callable[[nn.Module], nn.Module],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    distance: Callable[[nn.Module], float],
    steps: int,
    *,
    half: bool,
) -> float:
    """The distance after `steps` of `optimizer` on `batches`; `model` is as before.

    Args:
        objective: makes of the model a module that gives a batch's loss, and readies it to train.
        distance: of that module from its goal.
        half: in bfloat16, as far as torch.autocast deems that safe.
    """
    before = {name: tensor.detach().clone() for name, tensor in model_tensors(model).items()}
    rate, rates = cosine(steps), [group["lr"] for group in optimizer.param_groups]
    device = next(model.parameters()).device.type
    with (
        flags_kept(model),
        gradients_kept(model),
        torch.enable_grad(),
        torch.autocast(device, torch.bfloat16, enabled=half),
    ):
        training = objective(model)
        try:
            for step, batch in enumerate(islice(cycle(batches), steps)):
                for group, base in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = base * rate(step)
                backward(training(batch)[0])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return distance(training)
        finally:
            with torch.no_grad():
                for name, tensor in model_tensors(model).items():
                    tensor.copy_(before[name])
