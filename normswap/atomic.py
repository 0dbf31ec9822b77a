"""Output that is whole or absent: write beside the target, then rename.

A rename within one file system is atomic (POSIX rename(2)), so a single file is the previous one
or the new one at every moment. Several files take several renames. They are made under a lock of
the folder, and what is to be renamed is noted on disk before the first: a process that is killed
between two leaves work that the next one to write or load there completes (`settle`). If one of
them fails, those before it are undone.

A scratch folder lies beside the target:

    .normswap-XXXX/     its writer holds a lock on it, which the system drops when the writer dies
        half/           what is being written
        whole/          `half` under its new name: complete, to be moved into the folder around
        old/            second names (hard links) of the files that it replaces

Where the system or the file system has no such locks, nobody waits and nothing is settled.
"""

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from normswap.errors import NormswapError

Opened = TypeVar("Opened")
_PREFIX = ".normswap-"
# What a disk says, whoever writes to it.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield a scratch directory; on success its files replace those of `directory`, all or none.

    On any exception, Ctrl-C included, the scratch directory is removed and `directory` is as it
    was (it is not even created). Files of other names in `directory` are left alone. A symbolic
    link in the place of a file is itself replaced, not what it points to.

    Raises:
        NormswapError: `directory` cannot be written, or the disk is full.
    """
    directory = directory.absolute()
    with _told(directory):
        # Any existing ancestor is on the file system on which the target will be made, which is all
        # that a rename needs.
        home = next(parent for parent in (directory, *directory.parents) if parent.exists())
        home = home.resolve()
        for folder in (home, directory.parent):
            settle(folder)
        with _locked(home):  # so that nobody takes it for a dead one before it has its own lock
            scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
            lock = _lock(scratch, wait=True)
    try:
        with _told(directory):
            half = scratch / "half"
            half.mkdir()
        with _told(directory, only=_FULL):
            yield half
        with _told(directory):
            for file in _files(half):
                _flush(file)
            if _made(half, directory):
                return
            if not scratch.parent.samefile(directory):  # another process made it just now
                scratch = scratch.rename(directory / scratch.name)
            _commit(scratch, directory)
    finally:
        if not _files(scratch / "whole"):  # else it could be neither completed nor undone
            shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path with the name of `path`; on success the file written there replaces it.

    Files written next to it (an ONNX model's external data) move along.

    Raises:
        NormswapError: the folder of `path` cannot be written, or the disk is full.
    """
    with staged(path.absolute().parent) as scratch:
        yield scratch / path.name


def of_one_file(path: Path, reader: Callable[[Path], Opened]) -> Opened:
    """What `reader` returns of `path`, which it may open more than once, though others replace it.

    safetensors is such a reader: it opens the file for the header, and again for the tensors.
    """
    while True:
        before = _identity(path)
        try:
            opened = reader(path)
        except Exception:
            if before == _identity(path):
                raise
        else:
            if before == _identity(path):
                return opened


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def settle(directory: Path) -> None:
    """Complete what a process that was killed had begun to move into `directory`, or remove it.

    Without a lock, or the permission to write, nothing happens.
    """
    if any(_scratches(directory)):
        with _locked(directory) as held:
            if held:
                _settle(directory)


def _settle(directory: Path) -> None:
    for scratch in _scratches(directory):
        lock = _lock(scratch, wait=False)
        if lock is None:  # its writer lives
            continue
        try:
            for file in _files(scratch / "whole"):
                file.replace(directory / file.name)
            shutil.rmtree(scratch, ignore_errors=True)
        except OSError:
            pass  # the next one may be allowed to
        finally:
            os.close(lock)


def _made(half: Path, directory: Path) -> bool:
    """Let `half` be `directory`, if there is none yet."""
    if directory.exists():
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        half.rename(directory)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first
            return False
        raise
    return True


def _commit(scratch: Path, directory: Path) -> None:
    """Move the files of `scratch`, which lies in `directory`, to their places."""
    names = [file.name for file in _files(scratch / "half")]
    with _locked(directory):
        _settle(directory)  # else that would be done later, over what comes now
        for name in names:
            if (directory / name).is_dir() and not (directory / name).is_symlink():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder in it")
        if len(names) == 1:
            (scratch / "half" / names[0]).replace(directory / names[0])
            return
        (scratch / "old").mkdir()
        for name in names:
            if os.path.lexists(directory / name):
                _duplicate(directory / name, scratch / "old" / name)
        (scratch / "half").rename(scratch / "whole")  # from here on it would be completed
        _move(names, scratch, directory)


def _move(names: list[str], scratch: Path, directory: Path) -> None:
    whole, old, moved = scratch / "whole", scratch / "old", list[str]()
    try:
        for name in names:
            (whole / name).replace(directory / name)
            moved.append(name)
    except BaseException:
        # In this order: killed in between, it would be completed after all.
        for name in moved:
            _duplicate(directory / name, whole / name)
        for name in moved:
            if os.path.lexists(old / name):
                (old / name).replace(directory / name)
            else:
                (directory / name).unlink()
        whole.rename(scratch / "half")
        raise


def _duplicate(file: Path, other: Path) -> None:
    """A second name for `file`; a copy, where the file system has no hard links."""
    try:
        os.link(file, other, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(file, other, follow_symlinks=False)


def _files(folder: Path) -> list[Path]:
    # Not through a symbolic link: a folder from elsewhere must not have other files moved here.
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.is_symlink() or file.is_file())


def _scratches(folder: Path) -> list[Path]:
    try:
        found = list(folder.glob(f"{_PREFIX}*"))
    except OSError:
        return []
    return [each for each in found if each.is_dir() and not each.is_symlink()]


def _flush(file: Path) -> None:
    """To the disk: some file systems tell of a full one only then."""
    if not file.is_symlink():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Inside, no other process is; yields whether that is so."""
    lock = _lock(folder, wait=True)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A lock on `folder` that lasts until it is closed; None where there is none to be had."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            return None
        raise
    return descriptor


@contextmanager
def _told(directory: Path, only: set[int] | None = None) -> Iterator[None]:
    """Tell an error of the file system in one line; of what the caller does, `only` some."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors tells of one
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number is None or (only is not None and number not in only):
            raise
        reason = getattr(error, "strerror", None) or os.strerror(number)
        raise NormswapError(
            f"cannot write to {str(directory)!r}: {reason}; choose another output folder"
        ) from error
