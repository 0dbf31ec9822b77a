"""Learning-rate schedules that know what a normalization makes of weight decay.

A weight before a normalization is scale invariant: L(c w) = L(w), so its gradient is that at w
divided by c. Weight decay then only shortens the weight, which is the same as to take longer steps
on a weight that nothing shortens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sqrt

import torch
from torch.optim import SGD

from normswap.core.errors import NormswapError


@dataclass(frozen=True)
class ExponentialSchedule:
    """SGD without weight decay whose rate grows; with `torch.optim.lr_scheduler.ExponentialLR`.

    Attributes:
        lr: the rate of the first step.
        gamma: by how much each step multiplies it.
        momentum: as before.
        shrink: alpha, by how much a step of the other run shortens the weights when the gradient
            is zero and the velocity steady.
    """

    lr: float
    gamma: float
    momentum: float
    shrink: float

    def start(self, optimizer: SGD) -> None:
        """Give `optimizer`, before its first step, the velocity that the other run starts with.

        Standing still while it shrinks, that run is moving where nothing shrinks: outward, by
        (1 - alpha) w. Without momentum there is nothing to give.
        """
        if not self.momentum:
            return
        before = self.lr / self.gamma  # the rate that a step before the first would have had
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                velocity = parameter.detach() * (-(1 - self.shrink) / before)
                optimizer.state[parameter]["momentum_buffer"] = velocity.to(
                    parameter.dtype, memory_format=torch.preserve_format
                )


def exponential_lr(lr: float, weight_decay: float, momentum: float = 0.0) -> ExponentialSchedule:
    """The schedule without weight decay that equals a constant `lr` with it, step for step.

    For scale-invariant weights, and torch's SGD. With alpha the larger root of
    x^2 - (1 + momentum - lr weight_decay) x + momentum = 0, the weights of the two runs at step t
    differ by the factor alpha^t alone, where the rate of step t is lr alpha^(-2t - 1).

    Example:
        schedule = exponential_lr(0.1, 5e-4, 0.9)
        optimizer = SGD(weights, lr=schedule.lr, momentum=schedule.momentum)
        schedule.start(optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, schedule.gamma)

    Source: Li & Arora 2019, arXiv 1910.07454, section 2.

    Raises:
        NormswapError: a number is out of range, or lr weight_decay > (1 - sqrt(momentum))^2, where
            there is no such schedule: the weights would swing about zero.
    """
    check_rates(lr, weight_decay, momentum)
    decay, most = lr * weight_decay, (1 - sqrt(momentum)) ** 2
    if decay > most or (decay == most and not momentum):
        raise NormswapError(
            f"lr times weight_decay is {decay:.3g}, and with momentum {momentum:g} only up to "
            f"{most:.3g} equals a growing rate; take less of either"
        )
    total = 1 + momentum - decay
    shrink = (total + sqrt(max(total * total - 4 * momentum, 0.0))) / 2
    return ExponentialSchedule(lr / shrink, shrink**-2, momentum, shrink)


def check_rates(lr: float, weight_decay: float, momentum: float) -> None:
    """Refuse numbers that SGD cannot use."""
    if not (lr > 0 and weight_decay >= 0 and 0 <= momentum < 1):
        raise NormswapError(
            f"lr {lr:g} must be above 0, weight_decay {weight_decay:g} not below it, "
            f"momentum {momentum:g} from 0 to below 1"
        )


Rate = Callable[[int], float]


def cosine(steps: int) -> Rate:
    """From 1 to 0 in half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5)."""
    return lambda step: (1 + cos(pi * step / steps)) / 2


def exponential(gamma: float) -> Rate:
    """gamma^step, as of `normswap.exponential_lr`."""
    return lambda step: gamma**step
