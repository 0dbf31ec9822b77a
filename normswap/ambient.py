"""torch's settings around the call of a verb, which must not change what the verb makes.

Nor may the verb change them: the random number generators are where they were after it.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch

# torch has no public way to ask whether its fake tensors are switched on.
from torch._guards import detect_fake_mode

from normswap.errors import NormswapError


@contextmanager
def usual_settings() -> Iterator[None]:
    """Inside, torch is as it is when a program starts; also a decorator, `@usual_settings()`.

    - Under `torch.inference_mode()` parameters would be made that never train; under `no_grad`
      nothing could be trained.
    - Under autocast a captured graph would have casts in it, and weights would be computed in half
      precision.
    - On the device "meta" new tensors would have no contents.
    - What the model, the data or an import draws at random would shift what the caller draws next,
      so the generators end where they began.

    Raises:
        NormswapError: a transform of torch.func is running, which has replaced the tensors, or
            FakeTensorMode, under which no tensor has numbers.
    """
    # torch has no public name for it.
    if torch._C._are_functorch_transforms_active():
        raise NormswapError(
            "a model cannot be rewritten inside torch.func.grad, vmap or another of its "
            "transforms; rewrite it first, and transform the result"
        )
    if detect_fake_mode() is not None:
        raise NormswapError(
            "under FakeTensorMode tensors have no numbers; call this outside of it, on the model "
            "with its weights"
        )
    with ExitStack() as settings:
        settings.enter_context(generators_kept())
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        for device in ("cpu", torch.accelerator.current_accelerator()):
            kind = device if isinstance(device, str) or device is None else device.type
            if kind is not None and torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type == "meta":
            settings.enter_context(torch.device("cpu"))
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn inside, every global generator ends in the state in which it began.

    Those are Python's, numpy's, and torch's of the CPU and of the devices that are in use.
    """
    back: list[Callable[[], None]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():  # before that it has drawn nothing
            back.append(partial(device.set_rng_state_all, device.get_rng_state_all()))
    if torch.mps.is_available():
        back.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for restore in back:
            restore()
