"""The ordinary fine-tune of a pretrained model, with the statistics of its BatchNorms frozen.

Statistics that move while the weights move make a pretrained model worse before it gets better, and
with small batches for good; so they are kept, as detection models keep theirs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError, first_line
from normswap.core.modes import flags_kept
from normswap.core.types import Batches
from normswap.fit.batch import labels_of, logits_of, run, wide
from normswap.fit.evaluate import check_labels, right_and_labelled
from normswap.fit.learn import learn, unless_it_fails
from normswap.fit.parameter_groups import param_groups
from normswap.fit.processes import Processes
from normswap.fit.ranks import together
from normswap.fit.reading import first_inputs
from normswap.fit.schedules import Rate, check_rates, cosine, exponential, exponential_lr
from normswap.fit.stream import Stream, peeked
from normswap.fit.training import OnStep, Precision, Settings
from normswap.graph.norm_modules import norm_kind
from normswap.graph.norm_modules import statistics as statistics_of
from normswap.graph.supported import check_trainable
from normswap.passes.freeze import Freeze, Unfreeze
from normswap.passes.plan import Plan, plan
from normswap.passes.recipe import recipe_kept

StatisticsMode = Literal["eval", "tune", "update"]
Schedule = Literal["cosine", "exponential"]
TaskLoss = Callable[[Any, Any], Tensor]
GATES = 10.0  # times the rate of the rest (Nam & Kim 2018, arXiv 1805.07925)


@usual_settings()
def finetune(
    model: nn.Module,
    data: Batches,
    *,
    steps: int,
    statistics: StatisticsMode = "eval",
    loss: TaskLoss | None = None,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: Schedule = "cosine",
    accumulate: int = 1,
    precision: Precision = "float32",
    clip: float | None = None,
    sync_batch_norm: bool = False,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> nn.Module:
    """Train `model`, in place, by SGD on labelled data, its BatchNorm statistics as they are.

    Args:
        data: batches (input, label), or dicts of keyword inputs, as the model is to be trained on
            them; read again when they end. Under accelerate launch or torchrun each process reads
            its own share.
        steps: of the optimizer, each on `accumulate` batches.
        statistics: "eval": BatchNorms normalize with their running statistics. "tune": the same
            function and gradients in less memory (`normswap.freeze`). "update": as torch trains.
        loss: called with the model's output and the batch, it returns the mean loss of the batch's
            samples; by default the loss that the model itself returns, or cross-entropy.
        lr: the rate at the start.
        weight_decay: of the weights; none on what `normswap.param_groups` exempts.
        schedule: "cosine" falls to 0. "exponential" grows, in the place of the weight decay: the
            same training for scale-invariant weights (`normswap.exponential_lr`).
        precision: "float32"; or "bfloat16" or "float16", in which it computes what
            torch.autocast deems safe.
        clip: the largest norm of the gradient.
        sync_batch_norm, checkpoint, save_every, resume, on_step: as for `normswap.recover`.

    Returns:
        `model`, with its own classes, hooks and training flags; BatchNorms train again. The random
        state is as before, so that a second call draws the same.

    Raises:
        NormswapError: the data fail or do not fit, or there is nothing to train; the model is as
            before. Or the loss blew up; the model has the last good weights then.
        KeyboardInterrupt: Ctrl-C, after the step it came in. A second one does not wait, and leaves
            the model as before.

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, (images, labels) = digits(), digits_data("train")
        >>> data = list(zip(images[:64].split(16), labels[:64].split(16), strict=True))
        >>> losses = []
        >>> tuned = normswap.finetune(
        ...     model, data, steps=4, on_step=lambda step, loss: losses.append(loss)
        ... )
        >>> len(losses)
        4
    """
    for name, value, known in (
        ("statistics", statistics, StatisticsMode),
        ("schedule", schedule, Schedule),
    ):
        if value not in get_args(known):
            raise NormswapError(f"{name} is {value!r}; it is {' or '.join(get_args(known))}")
    check_rates(lr, weight_decay, momentum)
    settings = Settings(
        steps=steps,
        accumulate=accumulate,
        clip=clip,
        precision=precision,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        save_every=save_every,
        resume=resume,
        on_step=on_step,
    )
    settings.check_folder()
    check_trainable(model)
    growing = exponential_lr(lr, weight_decay, momentum) if schedule == "exponential" else None
    rate: Rate = cosine(steps) if growing is None else exponential(growing.gamma)

    def optimizer(each: nn.Module) -> torch.optim.Optimizer:
        groups = param_groups(each, weight_decay=weight_decay, gate_lr=lr * GATES)
        if growing is None:
            return torch.optim.SGD(groups, lr=lr, momentum=momentum)
        for group in groups:
            group["steady"] = not group["weight_decay"]
            group["weight_decay"] = 0.0
            if not group["steady"]:
                group["lr"] = growing.lr
        made = torch.optim.SGD(groups, lr=lr, momentum=momentum)
        growing.start(made)
        # Where there is no decay to stand for, the rate is constant and the start at rest.
        for group in made.param_groups:
            for parameter in group["params"] if group["steady"] else ():
                made.state.pop(parameter, None)
        return made

    processes = Processes()
    with together():
        first, data = peeked(data, 1)
    with unless_it_fails(model), _frozen(model, statistics, first):
        learn(
            model,
            lambda each: Task(each.train(), loss),
            optimizer,
            rate,
            Stream(data),
            settings,
            processes,
            title="fine-tuning",
            about={
                "statistics": statistics,
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "schedule": schedule,
            },
            sync_batch_norm=sync_batch_norm,
        )
    return model


class Task(nn.Module):
    """A model, called on a batch, gives its mean loss and how many it got right."""

    def __init__(self, model: nn.Module, loss: TaskLoss | None) -> None:
        super().__init__()
        self.model = model
        self._loss = task_loss if loss is None else loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        output = run(self.model, batch)
        return self._loss(output, batch), right_and_labelled(output, labels_of(batch))


def task_loss(output: Any, batch: Any) -> Tensor:
    """The `loss` in the model's output where it has one, else cross-entropy with the labels.

    Raises:
        NormswapError: there are no labels, or the model returns no logits.
    """
    own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    logits, labels = logits_of(output), labels_of(batch)
    if logits is None:
        raise NormswapError(
            f"the model returns {type(output).__name__}, which are no logits (N, K); pass loss=, "
            "a function of the output and the batch"
        )
    if labels is None:
        raise NormswapError("the data have no labels; yield (input, label) batches")
    if not labels.is_floating_point():
        # On an accelerator a label out of range ends the whole process's use of it.
        check_labels(labels, logits.shape[1])
    try:
        return F.cross_entropy(wide(logits), labels.to(logits.device))
    except (RuntimeError, IndexError, ValueError) as error:
        raise NormswapError(
            f"labels {tuple(labels.shape)}, {labels.dtype}, up to {labels.max()} do not fit logits "
            f"{tuple(logits.shape)}: {first_line(error)}; give one class of 0 to "
            f"{logits.shape[1] - 1} for each sample"
        ) from error


@contextmanager
def _frozen(model: nn.Module, mode: StatisticsMode, data: Iterable[Any]) -> Iterator[None]:
    """Inside, the BatchNorms of `model` are frozen; those that were so before stay it."""
    thawed = [
        path
        for path, module in model.named_modules()
        if norm_kind(module) == "batch" and statistics_of(module, "batch") == "running"
    ]
    if mode == "update" or not thawed:
        yield
        return
    inputs = first_inputs(model, data) if mode == "tune" else None
    with recipe_kept(model), flags_kept(model):
        plan(model, Freeze(mode), inputs=inputs).apply(model, inplace=True)
        try:
            yield
        finally:
            thaw = [edit for edit in plan(model, Unfreeze()).edits if edit.site in thawed]
            Plan(edits=tuple(thaw)).apply(model, inplace=True)
