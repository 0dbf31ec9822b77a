"""Work in a forked process: one that is killed, refused, or short of memory at a chosen moment."""

import gc
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

# What Python tells an audit hook before it does it: every step that changes a folder.
STEPS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "tempfile.mkdtemp"}
REFUSED = 2


def child(work: Callable[[], object], *, seconds: int = 60) -> int:
    """Run `work` in a child: its status, -9 where it was killed, 2 for a line to the user.

    A child that raises anything but a NormswapError, or hangs, fails the test.
    """
    return finished(started(work, seconds=seconds))


def started(work: Callable[[], object], *, seconds: int = 60) -> int:
    """The process id of a child that runs `work`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    # A session of ONNX Runtime that is garbage of the parent waits for ever for its threads, which
    # no child has, when the child collects it.
    gc.freeze()
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's raises in Python alone
        signal.alarm(seconds)
        status = _status(work)
    finally:
        os._exit(status)


def finished(pid: int) -> int:
    """The status of a child that was `started`, once it has ended."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, REFUSED, -signal.SIGKILL), f"the child ended with {status}"
    return status


def _status(work: Callable[[], object]) -> int:
    from normswap.core.errors import NormswapError

    try:
        work()
    except NormswapError as error:
        return REFUSED if "\n" not in str(error) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def command(*words: str) -> None:
    """A command of normswap, in this process and without a word."""
    from normswap.cli import main

    sys.argv = ["normswap", *words]
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{words[0]} ended with {ended.code}") from ended


def forked(folder: Path, words: Sequence[str]) -> int:
    """The process id of a child that carries out a command of normswap in `folder`.

    What it prints is in the files stdout and stderr there.
    """

    def work() -> None:
        from normswap.cli import main

        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        sys.argv = ["normswap", *words]
        with (
            Path("stdout").open("a", encoding="utf-8") as out,
            Path("stderr").open("a", encoding="utf-8") as err,
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                main()
                status = 0
            except SystemExit as ended:
                status = int(ended.code or 0)
        os._exit(status)

    return started(work, seconds=120)


def killed(work: Callable[[], object], step: int | None, seconds: float) -> bool:
    """Do `work` in a child, killed at a step on files, or after some seconds; whether it was."""

    def until_the_step() -> None:
        if step is not None:
            at_step(step, die)
        work()

    pid = started(until_the_step, seconds=600)
    if step is None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return finished(pid) != 0


def steps_and_seconds(work: Callable[[], object], noted: Path) -> tuple[int, float]:
    """How many steps on files `work` takes in a child, which notes them in a file, and how long."""

    def counting() -> None:
        steps = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal steps
            steps += is_step(event, arguments)

        sys.addaudithook(count)
        work()
        noted.write_text(str(steps), encoding="utf-8")

    begun = time.monotonic()
    assert child(counting, seconds=600) == 0
    return int(noted.read_text(encoding="utf-8")), time.monotonic() - begun


def at_step(number: int, act: Callable[[], object]) -> None:
    """From now on, do `act` before the step `number`, from 1, that this process takes on files."""
    taken = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal taken
        if is_step(event, arguments):
            taken += 1
            if taken == number:
                act()

    sys.addaudithook(hook)


def is_step(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether this audit event changes files; of those that are opened, where it is to write."""
    written = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return event in STEPS and bool(written)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def short_of_memory(megabytes: int) -> None:
    """From now on this process may take so much more memory than it has, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below `folder` by its path: what it holds, or where a symbolic link points."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        with suppress(OSError):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = str(path.readlink())
            elif path.is_file():
                found[name] = path.read_bytes()
            else:
                found[name] = "folder"
    return found
