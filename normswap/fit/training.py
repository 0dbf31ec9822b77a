"""The loop that recover and finetune share: steps of an optimizer, safe to stop and to go on with.

Its random numbers are two: those of the data (`normswap.fit.stream`) and those of the model. With
both, the weights, the optimizer's state and the place in the data in a checkpoint, a run that goes
on from it ends with the same bits as one that was never interrupted.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.fit import checkpoints
from normswap.fit.batch import size_of
from normswap.fit.display import Display
from normswap.fit.guard import Guard
from normswap.fit.interrupts import deferred
from normswap.fit.processes import Processes
from normswap.fit.randomness import Randomness
from normswap.fit.ranks import gathered_parts, is_first, rank_of_this
from normswap.fit.stream import Stream

Precision = Literal["no", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What the objective returns for a batch: the mean loss of its samples, and how many of them were
# right and how many had a label; or None for both.
Outcome = tuple[Tensor, Tensor]
Objective = nn.Module


@dataclass(frozen=True)
class Settings:
    """How a run goes; see `normswap.recover` and `normswap.finetune`."""

    steps: int
    accumulate: int = 1
    clip: float | None = None
    precision: Precision = "no"
    checkpoint: Path | None = None
    save_every: int = 100
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise NormswapError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.precision not in get_args(Precision):
            raise NormswapError(f"precision is {self.precision!r}; it is no, bf16 or fp16")
        if self.resume and self.checkpoint is None:
            raise NormswapError("to resume, name the folder of the checkpoint")


class Training:
    """One run: `go` takes the steps that are left."""

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        data: Iterable[Any],
        settings: Settings,
        processes: Processes,
        about: dict[str, Any],
    ) -> None:
        self.objective, self.model, self.optimizer, self.rate = objective, model, optimizer, rate
        self.settings, self.processes = settings, processes
        self.device = next(model.parameters()).device
        self.stream = Stream(data)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.guard = Guard(model)
        self.step = 0
        self._base = [group["lr"] for group in optimizer.param_groups]
        # What a checkpoint must agree on: another run's would be mixed with this one otherwise.
        self._about = {**asdict(settings), **about, "processes": processes.count}
        for name in ("checkpoint", "save_every", "resume"):
            del self._about[name]

    def go(self, title: str) -> None:
        """Take the steps that are left.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the step it came in; the checkpoint is written.
            NormswapError: the loss blew up, or the data or the checkpoint cannot be used.
        """
        settings = self.settings
        if settings.checkpoint is not None:
            self._open(settings.checkpoint)
        display = Display(title, settings.steps, self.step, quiet=not is_first())
        with display, deferred() as pressed:
            while self.step < settings.steps:
                loss, accuracy, rate, stop = self._advance(pressed)
                display.show(self.step, loss, accuracy, rate)
                if self.step % settings.save_every == 0 or stop or self.step == settings.steps:
                    self.guard.keep(self.step)
                    if settings.checkpoint is not None:
                        self._save(settings.checkpoint)
                if stop:
                    raise KeyboardInterrupt(self._how_to_go_on())

    def _advance(self, pressed: Callable[[], bool]) -> tuple[float, float | None, float, bool]:
        """One step: its loss, accuracy and rate, and whether to stop after it."""
        batches, weights = self._batches()
        factor = self.rate(self.step)
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor
        told = torch.zeros(4, dtype=torch.float64)  # loss, right, labelled, whether to stop
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            with self.processes.synchronizing(self.objective, index == len(batches) - 1):
                with self._autocast():
                    loss, right = self.objective(batch)
                self.scaler.scale(loss * weight).backward()
            told[0] += float(loss.detach()) * weight / self.processes.count
            told[1:3] += right.cpu()
        told[3] = pressed()
        told = torch.stack([each[0] for each in gathered_parts([told])]).sum(0)
        mean, hits, labelled, stop = told.tolist()
        rate = self.optimizer.param_groups[0]["lr"]
        self.guard.check(mean, self.step, rate, batches, half=self.scaler.is_enabled())
        if self.settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return mean, hits / labelled if labelled else None, rate, bool(stop)

    def _batches(self) -> tuple[list[Any], list[float]]:
        """The batches of one step, and the weight of each in its loss.

        The gradient is the mean over all samples of all processes, whatever batch each of them has.
        Wrappers average over processes, so the weights of a step sum to their number.
        """
        batches = [next(self.stream) for _ in range(self.settings.accumulate)]
        own = torch.tensor([size_of(batch) for batch in batches], dtype=torch.float64)
        every = torch.stack([each[0] for each in gathered_parts([own])])
        if not self.step:
            self.processes.warn(self.model, every[:, 0].int().tolist())
        return batches, (own * self.processes.count / every.sum()).tolist()

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES.get(self.settings.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _save(self, folder: Path) -> None:
        model = checkpoints.whole(checkpoints.model_tensors(self.model))
        optimizer = checkpoints.whole(checkpoints.optimizer_tensors(self.optimizer))
        ranks = {
            f"random{rank}": tensors
            for rank, tensors in enumerate(checkpoints.of_every_rank(Randomness.now().tensors()))
        } | {
            f"data{rank}": tensors
            for rank, tensors in enumerate(checkpoints.of_every_rank(self.stream.place()))
        }
        facts = {
            "about": self._about,
            "step": self.step,
            "losses": self.guard.losses,
            "scaler": self.scaler.state_dict(),
        }
        if is_first():
            checkpoints.write(folder, {"model": model, "optimizer": optimizer, **ranks}, facts)

    def _open(self, folder: Path) -> None:
        """Go to where the checkpoint in `folder` was written, or write the first one."""
        found = checkpoints.read(folder)
        if found is None:
            if self.settings.resume:
                raise NormswapError(f"there is no checkpoint in {str(folder)!r} to resume from")
            self._save(folder)
            return
        parts, facts = found
        step = facts["step"]
        if not self.settings.resume:
            if step < self.settings.steps:
                raise NormswapError(
                    f"{str(folder)!r} holds an interrupted run, at step {step}: resume it, or "
                    f"remove {checkpoints.FILE} there to start again"
                )
            self._save(folder)
            return
        for name, value in self._about.items():
            before = facts["about"].get(name)
            if before != value:
                raise NormswapError(
                    f"the run in {str(folder)!r} was another one: {name} was {before}, is "
                    f"{value}; resume it as it was begun"
                )
        self._load(parts, facts)

    def _load(self, parts: dict[str, checkpoints.Tensors], facts: dict[str, Any]) -> None:
        rank = rank_of_this()
        own = checkpoints.model_tensors(self.model)
        saved = parts.get("model", {})
        differ = {n for n, t in own.items() if n not in saved or saved[n].shape != t.shape}
        if differ or len(saved) != len(own):
            raise NormswapError(
                f"the checkpoint is of another model: {min(differ or saved.keys() - own)} differs"
            )
        self.stream.go_to(parts[f"data{rank}"])
        for name, tensor in own.items():
            checkpoints.assign(tensor, saved[name])
        checkpoints.load_optimizer(self.optimizer, parts.get("optimizer", {}))
        self.scaler.load_state_dict(facts["scaler"])
        self.step, self.guard.losses = facts["step"], facts["losses"]
        self.guard.keep(self.step)
        Randomness.of(parts[f"random{rank}"]).restore()

    def _how_to_go_on(self) -> str:
        done = f"interrupted after step {self.step} of {self.settings.steps}"
        if self.settings.checkpoint is None:
            return f"{done}; the model has the weights of that step"
        return f"{done}; the same with resume goes on from {str(self.settings.checkpoint)!r}"
