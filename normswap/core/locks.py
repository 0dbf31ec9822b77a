"""Locks on folders, which the system drops when the process that holds them dies."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normswap.core.errors import NormswapError

# Seconds to wait for another writer. Its moves take moments, but anybody who may read a folder can
# hold a lock on it, for ever.
PATIENCE = 60.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process is, if there are locks to be had.

    Raises:
        NormswapError: another process held it for `PATIENCE` seconds.
    """
    lock = lock_of(folder, patience=PATIENCE)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def lock_of(folder: Path, *, patience: float = 0.0) -> int | None:
    """A lock on `folder` that lasts until it is closed; None where there is none to be had.

    Raises:
        NormswapError: after some `patience`, another process still holds it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    end, pause = time.monotonic() + patience, 0.001
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(pause)
                    pause = min(2 * pause, 0.1)
                    continue
                if patience:
                    raise NormswapError(
                        f"another process has held the lock of {str(folder)!r} for {patience:.0f} "
                        "seconds; wait for it, or choose another output folder"
                    ) from None
                break
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            return None
        raise
    os.close(descriptor)
    return None
