"""The loop that recover and finetune share: steps of an optimizer, safe to stop and to go on with.

Its random numbers are two: those of the data (`normswap.fit.stream`) and those of the model. With
both, the weights, the optimizer's state and the place in the data in a checkpoint, a run that goes
on from it ends with the same bits as one that was never interrupted.

A person sees of a run one live line on a terminal, or ten plain ones in a log.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from rich.progress import BarColumn, TimeRemainingColumn
from torch import nn

from normswap.core.atomic import check_writable
from normswap.core.errors import NormswapError
from normswap.core.interrupts import StopRequested, deferred
from normswap.core.terminal import Words, is_quiet, progress, stderr
from normswap.fit import checkpoints
from normswap.fit.batch import backward, size_of
from normswap.fit.distill import BlewUp, Guard
from normswap.fit.held_back import Judge
from normswap.fit.processes import Processes
from normswap.fit.randomness import Randomness
from normswap.fit.ranks import gathered_parts, is_first, rank_of_this, together
from normswap.fit.reading import about
from normswap.fit.stream import Stream

_SMOOTH = 0.9  # of a moving average over the steps shown


class Display:
    """Loss, accuracy, learning rate and time left; quiet in all but the first process."""

    def __init__(self, title: str, steps: int, done: int, *, quiet: bool) -> None:
        self._steps, self._quiet = steps, quiet
        self._mean: dict[str, float] = {}
        self._bar = progress(
            Words("{task.description}"),
            BarColumn(),
            Words("{task.completed}/{task.total} {task.fields[figures]}"),
            TimeRemainingColumn(),
            quiet=quiet,
        )
        self._title = title
        self._task = self._bar.add_task(title, total=steps, completed=done, figures="")

    def show(
        self,
        step: int,
        loss: float,
        accuracy: float | None,
        rate: float,
        held_back: float | None = None,
    ) -> None:
        """After `step` steps.

        Args:
            accuracy: None where there are no labels.
            held_back: the distance on what was held back, where that is measured.
        """
        new = {"loss": loss, **({} if accuracy is None else {"accuracy": accuracy})}
        for name, value in new.items():
            self._mean[name] = _SMOOTH * self._mean.get(name, value) + (1 - _SMOOTH) * value
        texts = [f"loss {self._mean['loss']:.4f}"]
        if "accuracy" in self._mean:
            texts.append(f"training accuracy {self._mean['accuracy']:.1%}")
        if held_back is not None:
            texts.append(f"held back {held_back:.3g}")
        figures = ", ".join([*texts, f"rate {rate:.2g}"])
        self._bar.update(self._task, completed=step, figures=figures)
        tenth = -(-self._steps // 10)
        due = step % tenth == 0 or step == self._steps
        if due and not self._quiet and not is_quiet() and not stderr.is_terminal:
            left = self._bar.tasks[0].time_remaining
            rest = f", {timedelta(seconds=round(left))} left" if left else ""
            said = f"{self._title}: {step}/{self._steps} {figures}{rest}"
            stderr.print(said, soft_wrap=True)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


Precision = Literal["float32", "bfloat16", "float16"]
OnStep = Callable[[int, float], None]
# Between a run and that which goes on with it.
_MAY_DIFFER = ("checkpoint", "save_every", "resume", "on_step")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How a run goes; see `normswap.recover` and `normswap.finetune`."""

    steps: int
    accumulate: int = 1
    clip: float | None = None
    precision: Precision = "float32"
    checkpoint: Path | None = None
    save_every: int = 100
    resume: bool = False
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise NormswapError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.clip is not None and not self.clip > 0:
            raise NormswapError(f"clip is {self.clip}; give a norm above 0, or none")
        if self.precision not in get_args(Precision):
            raise NormswapError(
                f"unknown precision {self.precision!r}; use float32, bfloat16 or float16"
            )
        if self.resume and self.checkpoint is None:
            raise NormswapError("to resume, name the folder of the checkpoint")

    def check_folder(self) -> None:
        """Call before anything else is done.

        Raises:
            NormswapError: there is no checkpoint to resume from, or one that would be overwritten.
        """
        if self.checkpoint is None:
            return
        check_writable(self.checkpoint, (checkpoints.FILE,))
        facts = checkpoints.facts_in(self.checkpoint)
        if self.resume and facts is None:
            raise NormswapError(
                f"there is no checkpoint in {str(self.checkpoint)!r} to resume from"
            )
        if facts is not None and not self.resume and facts["step"] < facts["about"]["steps"]:
            raise NormswapError(
                f"{str(self.checkpoint)!r} holds an interrupted run, at step {facts['step']}: "
                f"resume it, or remove {checkpoints.FILE} there to start again"
            )


class Training:
    """One run: `go` takes the steps that are left."""

    def __init__(
        self,
        objective: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        stream: Stream,
        settings: Settings,
        processes: Processes,
        about: dict[str, Any],
        judge: Judge | None = None,
    ) -> None:
        self.objective, self.model, self.optimizer, self.rate = objective, model, optimizer, rate
        self.settings, self.processes = settings, processes
        self.device = next(model.parameters()).device
        self.stream, self.judge = stream, judge
        scales = settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)
        self.guard = Guard(model, optimizer.param_groups[0]["lr"])
        self.step = 0
        self.agreed = True  # whether all processes go on, or stop, alike
        self._base = [group["lr"] for group in optimizer.param_groups]
        # What a checkpoint must agree on: another run's would be mixed with this one otherwise.
        named = (each.name for each in fields(settings) if each.name not in _MAY_DIFFER)
        same = {name: getattr(settings, name) for name in named}
        self._about = {**same, **about, "processes": processes.count}

    def go(self, title: str) -> None:
        """Take the steps that are left.

        Raises:
            StopRequested: Ctrl-C, after the step it came in; the checkpoint is written.
            NormswapError: the data or the checkpoint cannot be used.
            BlewUp: the training diverged. It would again, from any step, so its checkpoint goes.
        """
        with deferred() as pressed:  # the workers of a DataLoader do not stop at Ctrl-C then
            if self.settings.resume:
                self._resume()
            try:
                self._take_steps(title, pressed)
            except BlewUp:
                if self.settings.checkpoint is not None and is_first():
                    checkpoints.remove(self.settings.checkpoint)
                raise

    def _take_steps(self, title: str, pressed: Callable[[], bool]) -> None:
        steps, every, judge = self.settings.steps, self.settings.save_every, self.judge
        with Display(title, steps, self.step, quiet=not is_first()) as display:
            if judge is not None and not judge.curve:
                self._look(judge)
            while self.step < steps and not (judge is not None and judge.only_worse):
                loss, accuracy, rate, stop = self._advance(pressed)
                if judge is not None and judge.is_due(self.step, steps):
                    self._look(judge)
                held_back = None if judge is None else judge.last
                display.show(self.step, loss, accuracy, rate, held_back)
                if self.settings.on_step is not None and is_first():
                    self.settings.on_step(self.step, loss)
                # After the first step too: a folder that cannot be written is told of at once.
                if stop or self.step in (1, steps) or self.step % every == 0:
                    self.guard.check_weights(self.step)
                    self._save()
                if stop:
                    raise StopRequested(self._how_to_go_on())
        if judge is not None and judge.best[0] != self.step:
            self.guard.go_back()

    def _look(self, judge: Judge) -> None:
        """Measure on what was held back, and keep the weights where none before were better."""
        with self._autocast():
            better = judge.look(self.step)
        self.processes.reshard(self.objective)
        if better:
            self.guard.keep(self.step)

    def _advance(self, pressed: Callable[[], bool]) -> tuple[float, float | None, float, bool]:
        """One step: its loss, accuracy and rate, and whether to stop after it."""
        batches, weights = self._batches()
        factor = self.rate(self.step)
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base if group.get("steady") else base * factor
        told = torch.zeros(4, dtype=torch.float64)  # loss, right, labelled, whether to stop
        self.agreed = False
        for index, ((name, batch), weight) in enumerate(zip(batches, weights, strict=True)):
            last = index == len(batches) - 1
            with about(name, self.stream.hint), self.processes.synchronizing(self.objective, last):
                with self._autocast():
                    loss, right = self.objective(batch)
                backward(self.scaler.scale(loss * weight))
            told[0] += float(loss.detach()) * weight / self.processes.count
            told[1:3] += right.cpu()
        told[3] = pressed()
        told = torch.stack([each[0] for each in gathered_parts([told])]).sum(0)
        self.agreed = True
        mean, hits, labelled, stop = told.tolist()
        rate = self.optimizer.param_groups[0]["lr"]
        self.guard.check(mean, self.step, batches, half=self.scaler.is_enabled())
        if self.judge is None and self.step % self.settings.save_every == 0:
            self.guard.keep(self.step)
        if self.settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.processes.share_buffers(self.model)
        self.step += 1
        return mean, hits / labelled if labelled else None, rate, bool(stop)

    def _batches(self) -> tuple[list[tuple[str, Any]], list[float]]:
        """The batches of one step, each by its name, and the weight of each in its loss.

        The gradient is the mean over all samples of all processes, whatever batch each of them has.
        Wrappers average over processes, so the weights of a step sum to their number.
        """
        with together():
            batches = [self._next() for _ in range(self.settings.accumulate)]
            own = torch.tensor([size_of(batch) for _, batch in batches], dtype=torch.float64)
        every = torch.stack([each[0] for each in gathered_parts([own])])
        if not self.step:
            self.processes.warn(self.model, every[:, 0].int().tolist())
        return batches, (own * self.processes.count / every.sum()).tolist()

    def _next(self) -> tuple[str, Any]:
        batch = next(self.stream)
        return self.stream.name, batch

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES.get(self.settings.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _save(self) -> None:
        folder = self.settings.checkpoint
        if folder is None:
            return
        model = checkpoints.whole(checkpoints.model_tensors(self.model))
        optimizer = checkpoints.whole(checkpoints.optimizer_tensors(self.optimizer))
        random = checkpoints.of_every_rank(Randomness.now().tensors())
        places = checkpoints.of_every_rank(self.stream.place())
        ranks = {f"random{rank}": tensors for rank, tensors in enumerate(random)} | {
            f"data{rank}": tensors for rank, tensors in enumerate(places)
        }
        parts = {"model": model, "optimizer": optimizer, **ranks}
        if self.judge is not None and self.judge.best[0] != self.step:
            parts["best"] = checkpoints.whole(self.guard.good)
        facts = {
            "about": self._about,
            "step": self.step,
            "losses": self.guard.losses,
            "scaler": self.scaler.state_dict(),
            "curve": [] if self.judge is None else self.judge.curve,
        }
        with together():
            if is_first():
                checkpoints.write(folder, parts, facts)

    def _resume(self) -> None:
        """Go to where the checkpoint was written."""
        folder, rank = self.settings.checkpoint, rank_of_this()
        assert folder is not None  # Settings sees to it
        with together():
            parts, facts = checkpoints.read(folder)
            self._check(folder, parts.get("model", {}), facts["about"])
            try:
                random, place = Randomness.of(parts[f"random{rank}"]), parts[f"data{rank}"]
            except (KeyError, ValueError) as error:
                raise checkpoints.damaged(folder / checkpoints.FILE) from error
            self.stream.go_to(place)
        try:
            checkpoints.load_optimizer(self.optimizer, parts.get("optimizer", {}))
            self.scaler.load_state_dict(facts["scaler"])
        except (LookupError, ValueError, RuntimeError) as error:
            raise checkpoints.damaged(folder / checkpoints.FILE) from error
        for name, tensor in checkpoints.model_tensors(self.model).items():
            checkpoints.assign(tensor, parts["model"][name])
        self.step, self.guard.losses = facts["step"], facts["losses"]
        self.guard.keep(self.step)
        if self.judge is not None:
            self.judge.curve[:] = facts["curve"]
            self.guard.step = self.judge.best[0] if self.judge.curve else 0
            for name, tensor in parts.get("best", {}).items():
                checkpoints.assign(self.guard.good[name], tensor)
        random.restore()

    def _check(self, folder: Path, saved: checkpoints.Tensors, before: dict[str, Any]) -> None:
        """Raise unless the checkpoint is of this run."""
        for name, value in self._about.items():
            if before.get(name) != value:
                raise NormswapError(
                    f"the run in {str(folder)!r} was another one: {name} was {before.get(name)}, "
                    f"is {value}; resume it as it was begun"
                )
        own = checkpoints.model_tensors(self.model)
        differ = saved.keys() ^ own.keys()
        differ |= {
            name
            for name in saved.keys() & own.keys()
            if (saved[name].shape, saved[name].dtype) != (own[name].shape, own[name].dtype)
        }
        if differ:
            raise NormswapError(
                f"the checkpoint in {str(folder)!r} is of another model: {min(differ)} differs"
            )

    def _how_to_go_on(self) -> str:
        done = f"interrupted after step {self.step} of {self.settings.steps}"
        if self.settings.checkpoint is None:
            return f"{done}; the model has the weights of that step"
        folder = str(self.settings.checkpoint)
        return f"{done}; the same with resume (--resume) goes on from {folder!r}"
