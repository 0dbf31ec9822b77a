"""torch's settings around the call of a verb, which must not change what the verb makes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from normswap.errors import NormswapError


@contextmanager
def usual_settings() -> Iterator[None]:
    """Inside, torch is as it is when a program starts; also a decorator, `@usual_settings()`.

    - Under `torch.inference_mode()` parameters would be made that never train; under `no_grad`
      nothing could be trained.
    - Under autocast a captured graph would have casts in it, and weights would be computed in half
      precision.
    - On the device "meta" new tensors would have no contents.

    Raises:
        NormswapError: a transform of torch.func is running, which has replaced the tensors.
    """
    # torch has no public name for it.
    if torch._C._are_functorch_transforms_active():
        raise NormswapError(
            "a model cannot be rewritten inside torch.func.grad, vmap or another of its "
            "transforms; rewrite it first, and transform the result"
        )
    with ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        for device in ("cpu", torch.accelerator.current_accelerator()):
            kind = device if isinstance(device, str) or device is None else device.type
            if kind is not None and torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type == "meta":
            settings.enter_context(torch.device("cpu"))
        yield
