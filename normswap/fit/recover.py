"""Fine-tune a model whose normalization was replaced, back to what it was.

The original is the teacher: for every image, labelled or not, it says what the student is to
predict and what state each of its blocks is to hand on (`normswap.fit.distill`). The start is the
calibrated student.
"""

import math
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError
from normswap.core.modes import set_modes
from normswap.fit.boundaries import boundaries
from normswap.fit.calibrate import calibrate, replaced_norms
from normswap.fit.distill import Distillation, Loss
from normswap.fit.learn import learn, unless_it_fails
from normswap.fit.muon import Muon, muon_groups
from normswap.fit.processes import Processes
from normswap.fit.ranks import gathered, together
from normswap.fit.reading import about, first_inputs
from normswap.fit.schedules import cosine
from normswap.fit.stream import peeked
from normswap.fit.training import Precision, Settings
from normswap.graph.copies import copied
from normswap.graph.norm_modules import norm_kind
from normswap.graph.snapshot import evaluating
from normswap.graph.supported import check_trainable

CALIBRATED_ON = 512  # samples; more change nothing (tools/bench_recover.py)
# How far a step moves a weight, as a fraction of its norm, times the square root of how many there
# are: what small changes of many layers add up to grows so (Yang et al. 2023, arXiv 2310.02244).
LR = 0.045
WEIGHT = 100.0  # of the agreement of the blocks; steps do not depend on the scale of the sum


@usual_settings()
def recover(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    steps: int,
    loss: Loss | None = None,
    lr: float | None = None,
    accumulate: int = 1,
    precision: Precision = "no",
    sync_batch_norm: bool = False,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
    resume: bool = False,
) -> nn.Module:
    """Fine-tune `student`, in place, until it does what `teacher` does.

    The student is calibrated first, unless it is closer to the teacher as it is. Dropout and what
    else differs in training is off; only the normalizations that were put in train.

    Args:
        student: a copy of `teacher` in which normalizations were replaced.
        data: batches of inputs, as for `normswap.fit.batch.inputs_of`, as the model is to be
            trained on them: shuffled, and augmented where there are few. Read again when they end.
            Labels are not needed; with them the display shows an accuracy. Under accelerate launch
            or torchrun each process reads its own share.
        steps: of the optimizer, each on `accumulate` batches.
        loss: called with the student's output, the teacher's and the batch, it returns the mean
            loss of the batch's samples; for models that are no classifiers. The agreement of the
            blocks is added to it.
        lr: how far a step moves a weight at the start, as a fraction of its norm
            (`normswap.fit.muon`); it falls to 0 in half a cosine. By default it is 0.01 for a
            network of 20 layers and the less the more there are.
        precision: "no", or the type to compute in where torch.autocast deems it safe.
        sync_batch_norm: with several processes, the batch statistics of BatchNorms that the
            student has are those of all of them.
        checkpoint: a folder for the state of the run, written every `save_every` steps and on
            Ctrl-C; `resume` goes on from it, to the same bits.

    Returns:
        `student`, with its own classes, hooks and training flags. The random state is as before,
        so that a second call draws the same.

    Raises:
        NormswapError: the data fail, the models or data do not fit, or there is nothing to train;
            the student is as before. Or the loss blew up; it has the last good weights then.
        KeyboardInterrupt: Ctrl-C, after the step it came in. A second one does not wait, and leaves
            the student as before.
    """
    settings = Settings(
        steps=steps,
        accumulate=accumulate,
        precision=precision,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        save_every=save_every,
        resume=resume,
    )
    settings.check_folder()
    for model in (student, teacher):
        check_trainable(model)
    replaced = _replaced(student, teacher)
    if not replaced:
        raise NormswapError(
            "student and teacher have the same normalization layers; convert the student first"
        )
    processes = Processes()
    with together():
        first, data = peeked(data, CALIBRATED_ON)
    with together():
        paths = matched(student, teacher, first)
    rate = LR / math.sqrt(_depth(student)) if lr is None else lr
    guide = teacher if processes.count == 1 else copied(teacher).to(processes.device)

    def objective(model: nn.Module) -> nn.Module:
        set_modes(
            (module, any(f"{path}.".startswith(f"{each}.") for each in replaced))
            for path, module in model.named_modules()
        )
        return Distillation(model, guide, paths, WEIGHT, loss)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return Muon(muon_groups(model), lr=rate)

    with unless_it_fails(student), evaluating(guide, contents=False), torch.enable_grad():
        if not resume:
            _start(student, teacher, first, Distillation(student, teacher, paths, WEIGHT, loss))
        learn(
            student,
            objective,
            optimizer,
            cosine(steps),
            data,
            settings,
            processes,
            title="recovering",
            about={"lr": rate, "normalizations": _named(student, replaced)},
            sync_batch_norm=sync_batch_norm,
        )
    return student


def matched(student: nn.Module, teacher: nn.Module, data: Iterable[Any]) -> list[str]:
    """The paths of the modules whose outputs are to agree.

    Block by block; where there are no blocks, or the model cannot be captured, at the
    normalizations that were replaced.
    """
    try:
        found = boundaries(teacher, first_inputs(teacher, data))
    except NormswapError:
        found = []
    return found or _replaced(student, teacher)


def _replaced(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The paths at which the student has another normalization than the teacher."""
    modules = dict(student.named_modules())
    return [
        path
        for path, original in teacher.named_modules()
        if norm_kind(original) is not None
        and path in modules
        and repr(modules[path]) != repr(original)
    ]


def _named(student: nn.Module, replaced: list[str]) -> str:
    """What the normalizations that were put in are: their classes, and a number for the rest."""
    modules = [student.get_submodule(path) for path in replaced]
    classes = ", ".join(sorted({type(module).__name__ for module in modules}))
    every = "".join(f"{path} {m!r}" for path, m in zip(replaced, modules, strict=True))
    return f"{classes} ({sha256(every.encode()).hexdigest()[:8]})"


def _depth(model: nn.Module) -> int:
    """How many weights train that are matrices."""
    return max(sum(len(each["params"]) for each in muon_groups(model) if each["blocks"]), 1)


def _start(
    student: nn.Module, teacher: nn.Module, data: list[Any], objective: Distillation
) -> None:
    """Calibrate `student`, unless it is closer to `teacher` as it is: trained before, for example.

    A calibrated one comes out as it went in.
    """
    norms = [norm for _, norm, _ in replaced_norms(student, teacher)]
    if not norms:  # the new normalizations have nothing to fit
        return
    before = [parameter.detach().clone() for norm in norms for parameter in norm.parameters()]
    apart = _loss(objective, teacher, data)
    calibrate(student, teacher, data)
    if _loss(objective, teacher, data) > apart:
        after = (parameter for norm in norms for parameter in norm.parameters())
        with torch.no_grad():
            for parameter, value in zip(after, before, strict=True):
                parameter.copy_(value)


def _loss(objective: Distillation, teacher: nn.Module, data: list[Any]) -> float:
    """The mean loss of the batches of all processes, in eval mode."""
    told = torch.zeros(2, dtype=torch.float64)
    with evaluating(objective, teacher):
        for number, batch in enumerate(data, 1):
            with about(f"batch {number}"):
                told += torch.tensor([float(objective(batch)[0]), 1.0], dtype=torch.float64)
    total, batches = torch.stack(gathered(told)).sum(0).tolist()
    return total / batches if math.isfinite(total) else math.inf
