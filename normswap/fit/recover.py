"""Fine-tune a model whose normalization was replaced, back to what it was.

The original is the teacher: for every image, labelled or not, it says what the student is to
predict and what state each of its blocks is to hand on (`normswap.fit.distill`). The start is the
calibrated student.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError, warn
from normswap.core.modes import flags_kept, set_modes
from normswap.core.types import Batches
from normswap.fit import checkpoints
from normswap.fit.batch import size_of
from normswap.fit.boundaries import found_in
from normswap.fit.calibrate import calibrate, replaced_norms
from normswap.fit.distill import Distillation, Teacher
from normswap.fit.held_back import Judge, held_back, taken
from normswap.fit.learn import learn, unless_it_fails
from normswap.fit.muon import Muon, muon_groups
from normswap.fit.outputs import Loss, LossName, Part, check_loss, parts_of
from normswap.fit.probe import found_rate, outcome, probe_steps
from normswap.fit.processes import Processes
from normswap.fit.ranks import gathered, is_first, largest, of_the_first, rank_of_this, together
from normswap.fit.reading import Kept, Reading, first_inputs
from normswap.fit.schedules import cosine
from normswap.fit.training import OnStep, Precision, Settings
from normswap.graph.capture import Capture, capture
from normswap.graph.copies import copied
from normswap.graph.norm_modules import norm_kind
from normswap.graph.snapshot import evaluating
from normswap.graph.supported import check_trainable

LOOKED_AT = 64  # samples, whose outputs say what they are; they may be large
LR = 0.004  # how far a step moves a weight, as a fraction of its norm, where nothing was probed
WEIGHT = 100.0  # of the agreement of the blocks; steps do not depend on the scale of the sum


@usual_settings()
def recover(
    student: nn.Module,
    teacher: nn.Module,
    data: Batches,
    *,
    steps: int,
    loss: Loss | LossName | None = None,
    lr: float | None = None,
    accumulate: int = 1,
    precision: Precision = "float32",
    sync_batch_norm: bool = False,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> nn.Module:
    """Fine-tune `student`, in place, until it does what `teacher` does.

    The student is calibrated first, unless it is closer to the teacher as it is. Dropout and what
    else differs in training is off; only the normalizations that were put in train. How far the
    outputs are apart is measured on batches that are held back (`normswap.fit.held_back`), before,
    during and after: the student comes back with the weights with which they were nearest, and is
    no worse than it was. A run that only gets worse stops early, with a warning.

    Args:
        student: a copy of `teacher` in which normalizations were replaced.
        data: batches of inputs, as for `normswap.fit.batch.inputs_of`, as the model is to be
            trained on them: shuffled, and augmented where there are few. Read again when they end.
            Labels are not needed; with them the display shows an accuracy. Under accelerate launch
            or torchrun each process reads its own share.
        steps: of the optimizer, each on `accumulate` batches.
        loss: of the outputs, to which the agreement of the blocks is added. By default each tensor
            in them is compared as what it is: logits, probabilities or values, on the graph and
            in numbers (`normswap.fit.outputs`). "kl", "bce", "mse" or "cosine" for all of them; or
            a function of the student's output, the teacher's and the batch, which returns the mean
            over the batch's samples.
        lr: how far a step moves a weight at the start, as a fraction of its norm
            (`normswap.fit.muon`); it falls to 0 in half a cosine. By default 0.004; or, in a run of
            12 steps and more, that times a power of 4, found by a few steps
            (`normswap.fit.probe`).
        precision: "float32"; or "bfloat16" or "float16", in which it computes what
            torch.autocast deems safe.
        sync_batch_norm: with several processes, the batch statistics of BatchNorms that the
            student has are those of all of them.
        checkpoint: a folder for the state of the run, written every `save_every` steps and on
            Ctrl-C; `resume` goes on from it, to the same bits.
        on_step: called after each step, in the first process, with its number and its loss.

    Returns:
        `student`, with its own classes, hooks and training flags. The random state is as before,
        so that a second call draws the same.

    Raises:
        NormswapError: the data fail, the models or data do not fit, or there is nothing to train;
            the student is as before. Or the loss blew up; it has the last good weights then.
        KeyboardInterrupt: Ctrl-C, after the step it came in. A second one does not wait, and leaves
            the student as before.

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> student = normswap.convert(model, "layer_norm", data=images[:200].split(50))
        >>> student = normswap.recover(student, model, images[:200].split(50), steps=2)
    """
    return recovery(
        student,
        teacher,
        data,
        Settings(
            steps=steps,
            accumulate=accumulate,
            precision=precision,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            save_every=save_every,
            resume=resume,
            on_step=on_step,
        ),
        loss=loss,
        lr=lr,
        sync_batch_norm=sync_batch_norm,
    ).student


@dataclass(frozen=True)
class Recovery:
    """What `recover` did.

    Attributes:
        student: as it is now.
        loss: how the outputs were compared.
        lr: the rate at the start.
        given: the distance of the outputs, on the held-back batches, of the student that came in.
        curve: after which step it was how far; the first is before all steps, calibrated.
        step: the one whose weights the student has.
    """

    student: nn.Module
    loss: str
    lr: float
    given: float
    curve: tuple[tuple[int, float], ...]
    step: int


@usual_settings()
def recovery(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    settings: Settings,
    *,
    loss: Loss | LossName | None = None,
    lr: float | None = None,
    sync_batch_norm: bool = False,
) -> Recovery:
    """As `recover`, and what it did."""
    check_loss(loss)
    settings.check_folder()
    for model in (student, teacher):
        check_trainable(model)
    replaced = _replaced(student, teacher)
    if not replaced:
        raise NormswapError(
            "student and teacher have the same normalization layers; convert the student first"
        )
    processes = Processes()
    before = _before(settings)
    with together():
        split = held_back(data, settings.steps * settings.accumulate, before.place)
    count = int(-largest(-len(split.held)))  # as many in each process
    held = Kept(split.held[:count], hint=split.held.hint)
    with together():
        seen = _captured(teacher, split.first)
        paths = matched(student, teacher, seen)
        compared = (
            loss
            if callable(loss)
            else parts_of(student, teacher, taken(Reading(split.first), LOOKED_AT), seen, loss)
        )
    if not callable(compared):
        compared = of_the_first(compared)
    repeated = [*held, *(data if isinstance(data, (list, tuple)) else ())]
    told = Teacher(teacher, paths, repeated)
    guide, told_there = teacher, told
    if processes.count > 1:
        guide = copied(teacher).to(processes.device)
        told_there = Teacher(guide, paths, repeated)

    def objective(model: nn.Module, told: Teacher = told_there) -> nn.Module:
        set_modes(
            (module, any(f"{path}.".startswith(f"{each}.") for each in replaced))
            for path, module in model.named_modules()
        )
        return Distillation(model, told, WEIGHT, compared)

    def judged(wrapped: nn.Module) -> Judge:
        return Judge(partial(_distance, wrapped, held))

    with unless_it_fails(student), evaluating(guide, contents=False), torch.enable_grad():
        given = before.given
        if not settings.resume:
            near = Distillation(student, told, WEIGHT, compared)
            given = _start(student, teacher, split.first, held, near)
        rate = before.lr if lr is None else lr
        if rate is None:
            rate = LR
            if tried := probe_steps(settings.steps):

                def after(rate: float, steps: int = tried) -> float:
                    return outcome(
                        student,
                        partial(objective, told=told),
                        Muon(muon_groups(student), lr=rate),
                        split.first,
                        partial(_distance, held=held),
                        steps,
                        half=settings.precision != "float32",
                    )

                rate = found_rate(rate, after(rate, 0), after)

        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return Muon(muon_groups(model), lr=rate)

        judge = learn(
            student,
            objective,
            optimizer,
            cosine(settings.steps),
            split.stream,
            settings,
            processes,
            title="recovering",
            about={"lr": rate, "given": given, "normalizations": _named(student, replaced)},
            sync_batch_norm=sync_batch_norm,
            judged=judged,
        )
    assert judge is not None
    _tell(judge, settings.steps, rate)
    return Recovery(student, _told(compared), rate, given, tuple(judge.curve), judge.best[0])


def _told(compared: Loss | Sequence[Part]) -> str:
    """How outputs are compared, in words."""
    if callable(compared):
        return getattr(compared, "__name__", type(compared).__name__)
    return ", ".join(map(str, compared)) or "the states of the blocks alone"


def _tell(judge: Judge, steps: int, rate: float) -> None:
    """Say so where no step brought the student nearer."""
    last, distance = judge.curve[-1]
    best, least = judge.best
    if best or not steps or not is_first():
        return
    how = f"recover stopped after step {last} of {steps}, since" if last < steps else "recover:"
    warn(
        f"{how} no step brought the student nearer to the teacher on the held-back batches "
        f"({least:.3g} before, {distance:.3g} at last), so it is as it was before the first; try "
        f"a lower rate than {rate:.2g}, more data, or a loss that fits the output",
        stacklevel=3,
    )


def matched(student: nn.Module, teacher: nn.Module, seen: Capture | None) -> list[str]:
    """The paths of the modules whose outputs are to agree.

    Block by block; where there are no blocks, or the teacher cannot be captured, at the
    normalizations that were replaced.
    """
    return (found_in(seen) if seen is not None else []) or _replaced(student, teacher)


def _captured(teacher: nn.Module, data: Iterable[Any]) -> Capture | None:
    try:
        return capture(teacher, first_inputs(teacher, data))
    except NormswapError:
        return None


@dataclass(frozen=True)
class _Before:
    """What a run that goes on takes from its checkpoint.

    Attributes:
        place: where it is in the data.
        lr, given: as of `Recovery`.
    """

    place: dict[str, Tensor] | None = None
    lr: float | None = None
    given: float = math.nan


def _before(settings: Settings) -> _Before:
    if not settings.resume or settings.checkpoint is None:
        return _Before()
    with together():
        parts, facts = checkpoints.read(settings.checkpoint)
    about = facts["about"]
    return _Before(parts.get(f"data{rank_of_this()}"), about.get("lr"), about.get("given"))


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


def _start(
    student: nn.Module,
    teacher: nn.Module,
    data: Kept,
    held: Kept,
    objective: Distillation,
) -> float:
    """Calibrate `student`, unless it is closer to `teacher` as it is: trained before, for example.

    A calibrated one comes out as it went in.

    Returns:
        How far it was, as it came in.
    """
    with evaluating(student, teacher):
        given = _distance(objective, held)
    norms = [norm for _, norm, _ in replaced_norms(student, teacher)]
    if not norms:  # the new normalizations have nothing to fit
        return given
    before = [tensor.clone() for norm in norms for tensor in _own(norm)]
    calibrate(student, teacher, data)
    with evaluating(student, teacher):
        after = _distance(objective, held)
    if not after <= given:
        with torch.no_grad():
            for tensor, value in zip((t for n in norms for t in _own(n)), before, strict=True):
                tensor.copy_(value)
    return given


def _own(norm: nn.Module) -> list[Tensor]:
    return [each.detach() for each in (*norm.parameters(), *norm.buffers())]


def _distance(objective: nn.Module, held: Kept) -> float:
    """The mean distance of the outputs over the samples of all processes, in eval mode."""
    told = torch.zeros(2, dtype=torch.float64)
    # The flags alone: what shards a model minds if its parameters are put back.
    with flags_kept(objective), torch.no_grad():
        set_modes((module, False) for module in objective.modules())
        reading = Reading(held)
        for batch in reading:
            with reading.current():
                size = size_of(batch)
                told += torch.tensor([float(objective(batch)[0]) * size, size]).double()
    total, samples = torch.stack(gathered(told)).sum(0).tolist()
    return total / samples if math.isfinite(total) else math.inf
