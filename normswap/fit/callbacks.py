"""Frozen BatchNorm statistics in the training loops of others.

Lightning and the Trainer of transformers put a model in training mode themselves, the latter before
every step, so that a BatchNorm in eval mode does not stay in it. A frozen one
(`normswap.norms.batch.frozen`) does (He et al. 2017, arXiv 1703.06870, section 3.1).
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import nn

from normswap.core.errors import NormswapError
from normswap.graph.norm_modules import norm_kind, statistics
from normswap.norms.batch.frozen import check_statistics, freeze_statistics, thaw_statistics

_CALLBACKS = {
    "lightning.pytorch": "Callback",
    "pytorch_lightning": "Callback",
    "transformers": "TrainerCallback",
}


def _bases() -> tuple[type, ...]:
    """The callback classes of the frameworks that are here; they check for them, and add hooks."""
    found = []
    for framework, name in _CALLBACKS.items():
        with suppress(Exception):  # one that cannot be imported is not the one in use
            found.append(getattr(import_module(framework), name))
    return tuple(found)


class FrozenStatistics(*_bases()):  # type: ignore[misc]
    """A callback that keeps BatchNorm statistics as they are while a framework trains the model.

    For `callbacks=[normswap.FrozenStatistics()]` of a Trainer of Lightning, under both its names,
    or of transformers. From the start of training to its end every BatchNorm module normalizes with
    its running statistics and does not change them; gains and biases train. Parameters and
    state-dict keys are the same all along, in checkpoints too, and afterwards the model is what it
    was, but for its weights. Where a training in transformers breaks off, which tells no callback,
    the statistics stay frozen until it trains again, or until `normswap.unfreeze`.

    Raises:
        NormswapError: at the start of training: the model has no BatchNorm with running statistics,
            they are NaN or negative, or Lightning's StochasticWeightAveraging is to reset them.
    """

    def __init__(self) -> None:
        self._frozen: dict[nn.Module, nn.Module] = {}  # to the module that holds it

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Lightning's; by now it has made its SyncBatchNorms, where it was asked for them."""
        if any(type(each).__name__ == "StochasticWeightAveraging" for each in trainer.callbacks):
            # Frozen, they would stay at the 0 and 1 that it resets them to.
            raise NormswapError(
                "StochasticWeightAveraging estimates BatchNorm statistics anew at its end; "
                "leave it or FrozenStatistics out"
            )
        self._freeze(pl_module)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any
    ) -> None:
        """That of transformers."""
        self._freeze(model)

    def on_train_end(self, *args: Any, **others: Any) -> None:
        """Both call it so."""
        self._thaw()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Lightning's, Ctrl-C included."""
        self._thaw()

    def _freeze(self, model: nn.Module) -> None:
        kept = {
            path: statistics(module, "batch")
            for path, module in model.named_modules()
            if norm_kind(module) == "batch"
        }
        if not {"running", "frozen"} & {*kept.values()}:
            raise NormswapError(
                "the model has no BatchNorm with running statistics; leave FrozenStatistics out"
            )
        running = {path: model.get_submodule(path) for path in kept if kept[path] == "running"}
        for path, module in running.items():
            check_statistics(module, path)
        for path, module in running.items():
            freeze_statistics(module)
            self._frozen[module] = model.get_submodule(path.rpartition(".")[0])

    def _thaw(self) -> None:
        for module, holder in self._frozen.items():
            if statistics(module, "batch") == "frozen":  # and not thawed by someone else since
                thaw_statistics(module, training=holder.training)  # its own flag was pinned
        self._frozen.clear()
