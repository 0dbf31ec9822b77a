"""What a person sees of a run: one live line on a terminal, ten plain ones in a log."""

from types import TracebackType

from rich.progress import BarColumn, TimeRemainingColumn

from normswap.core.terminal import Words, progress, stderr

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

    def show(self, step: int, loss: float, accuracy: float | None, rate: float) -> None:
        """After `step` steps; accuracy is None where there are no labels."""
        new = {"loss": loss, **({} if accuracy is None else {"accuracy": accuracy})}
        for name, value in new.items():
            self._mean[name] = _SMOOTH * self._mean.get(name, value) + (1 - _SMOOTH) * value
        texts = [f"loss {self._mean['loss']:.4f}"]
        if "accuracy" in self._mean:
            texts.append(f"accuracy {self._mean['accuracy']:.1%}")
        figures = ", ".join([*texts, f"rate {rate:.2g}"])
        self._bar.update(self._task, completed=step, figures=figures)
        tenth = -(-self._steps // 10)
        due = step % tenth == 0 or step == self._steps
        if due and not self._quiet and not stderr.is_terminal:
            stderr.print(f"{self._title}: {step}/{self._steps} {figures}")

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
