"""Output that is whole or absent: write beside the target, then rename.

A rename within one file system is atomic (POSIX rename(2)), so a single file is the previous one
or the new one at every moment, and so is a new folder. Several files of a folder that is there
change by a journal (`normswap.core.journal`). If one of them fails, those before it are undone.

What is being written lies in a scratch folder, which is the user's alone:

    .normswap-INODE-RANDOM/   in the folder of that inode: the target, or what will hold it. Its
        files/                writer holds a lock on it, which the system drops when that dies

Where the system or the file system has no such locks, nobody waits, and nothing of what writers
that were killed were still writing is removed.
"""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from normswap.core import journal, locks
from normswap.core.errors import NormswapError
from normswap.core.paths import check_path, check_reachable

Opened = TypeVar("Opened")
# What a disk says, whoever writes to it.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_MOST_READS = 100  # of a file that others replace
_ABOVE = 2  # folders: that of a result, by default in normswap-out, is often new with the latter
_MOST_LINKS = 40  # in a path, as Linux has it


@contextmanager
def staged(directory: Path, *, gone: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a scratch directory; on success its files replace those of `directory`, all or none.

    A file keeps the mode and the owner of the one that it replaces. On any exception, Ctrl-C
    included, the scratch directory is removed and `directory` is as it was (it is not even
    created). Files of other names in `directory` are left alone. A symbolic link in the place of a
    file is itself replaced, not what it points to.

    Args:
        gone: names of files that are removed together with that, where there are no new ones.

    Raises:
        NormswapError: `directory` cannot be written, or the disk is full.
    """
    with _staged(directory, directory, gone) as scratch:
        yield scratch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path with the name of `path`; on success the file written there replaces it.

    Files written next to it (an ONNX model's external data) move along.

    Raises:
        NormswapError: the folder of `path` cannot be written, or the disk is full.
    """
    check_path(path)
    with _staged(path.parent, path) as scratch:
        yield scratch / path.name


def check_writable(directory: Path, names: Sequence[str] = ()) -> None:
    """Raise unless `staged` can write files of `names` to `directory`; for before long work.

    Raises:
        NormswapError: as `staged`.
    """
    with _told(directory):
        target = _real(directory)
        for name in names:
            check_path(name)
        scratch, lock = _scratch(target)
        try:
            for name in names:
                journal.check_place(target / name, scratch)
        finally:
            _remove(scratch, lock)


def of_one_file(path: Path, reader: Callable[[Path], Opened]) -> Opened:
    """What `reader` returns of `path`, which it may open more than once, though others replace it.

    safetensors is such a reader: it opens the file for the header, and again for the tensors. It
    is given another path where a writer that was killed has left the file in a journal.

    Raises:
        NormswapError: the journal cannot be used, or the path, or others write to the file all the
            time.
    """
    check_reachable(path)
    for _ in range(_MOST_READS):
        place = journal.located(path)
        before = _identity(place)
        try:
            opened = reader(place)
        except Exception as error:
            if before == _identity(place):
                if isinstance(error, NormswapError):
                    _raise_renamed(error, place, path)
                raise
        else:
            if before == _identity(place):
                return opened
    raise NormswapError(f"{str(path)!r} changes whenever it is read; wait for who writes it")


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


@contextmanager
def _staged(directory: Path, shown: Path, gone: Sequence[str] = ()) -> Iterator[Path]:
    """As `staged`; errors tell of the path `shown`."""
    with _told(shown):
        target = _real(directory)
        scratch, lock = _scratch(target)
    try:
        with _told(shown):
            files = scratch / journal.FILES
            files.mkdir()
        try:
            with _told(shown, below=files):
                yield files
        except NormswapError as error:
            _raise_renamed(error, files, directory)
            raise
        with _told(shown):
            for file in files.iterdir():
                _flush(file)
            if _made(files, target):
                return
            if scratch.parent != target:  # another process made it just now
                scratch = scratch.rename(target / journal.named(target, scratch.name[-8:]))
            journal.commit(scratch, target, gone)
    finally:
        _remove(scratch, lock)


def _scratch(target: Path) -> tuple[Path, int | None]:
    """A new scratch folder for `target`, and its lock."""
    # Any existing ancestor is on the file system on which the target will be made, which is all
    # that a rename needs.
    home = next(parent for parent in (target, *target.parents) if os.path.lexists(parent))
    # One that was killed when it had just made its folder left its scratch folder above that.
    for each in (home, *home.parents[:_ABOVE]):
        journal.remove_dead(each)
    if home == target:
        with locks.locked(target):
            journal.check_own(target)
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=journal.named(home), dir=home))
        lock = locks.lock_of(scratch, patience=locks.PATIENCE)
        if os.path.lexists(scratch):
            return scratch, lock
        if lock is not None:  # before it was locked somebody took it for a dead one
            os.close(lock)


def _remove(scratch: Path, lock: int | None) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _made(files: Path, target: Path) -> bool:
    """Let `files` be the folder `target`, if there is none yet."""
    if target.exists():
        return False
    for file in filter(Path.is_file, files.iterdir()):
        journal.take_over(file, target / file.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        files.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first
            return False
        raise
    return True


def _real(directory: Path) -> Path:
    """`directory` without links, none of which another user may have laid in our way.

    The rule is that of Linux (fs.protected_symlinks), which not every system has on: in a folder
    like /tmp, with the sticky bit, links are followed that are ours or of the folder's owner.
    """
    check_path(directory.absolute())
    found, rest = Path(directory.absolute().anchor), list(directory.absolute().parts[1:])
    links = 0
    while rest:
        part = rest.pop(0)
        step = found / part
        if part == "..":
            found = found.parent
        elif step.is_symlink():
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            _check_link(step)
            if not step.exists():
                raise FileNotFoundError(errno.ENOENT, f"{str(step)!r} is a link to nowhere")
            to = step.readlink()
            found = Path(to.anchor) if to.is_absolute() else found
            rest = [*to.parts[to.is_absolute() :], *rest]
        else:
            found = step
    return found


def _check_link(link: Path) -> None:
    folder, owner = link.parent.stat(), link.lstat().st_uid
    others_write = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
    if others_write and owner not in (journal.user(), folder.st_uid):
        raise PermissionError(errno.EPERM, f"{str(link)!r} is a link that another user made")


def _flush(file: Path) -> None:
    """To the disk: some file systems tell of a full one only then."""
    if file.is_file() and not file.is_symlink():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


@contextmanager
def _told(shown: Path, below: Path | None = None) -> Iterator[None]:
    """Tell an error of the file system in one line, by the path that the user knows.

    What a caller does inside may have errors that are its own: where the scratch folder `below` is
    given, only what concerns files in that is told, and what a full disk says of no file by name.
    """
    try:
        yield
    except NormswapError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors tells of one
        number = int(found[1]) if found else getattr(error, "errno", None)
        unnamed = getattr(error, "filename", None) is None
        ours = below is None or (number in _FULL and unnamed) or str(below) in str(error)
        if number is None or not ours:
            raise
        reason = getattr(error, "strerror", None) or os.strerror(number)
        raise NormswapError(
            f"cannot write to {str(shown)!r}: {reason}; choose another output folder"
        ) from error


def _raise_renamed(error: NormswapError, path: Path, shown: Path) -> None:
    """Raise `error` with `shown` in the place of `path`, which the user does not know, if it is."""
    if path != shown and str(path) in str(error):
        raise NormswapError(str(error).replace(str(path), str(shown))) from error
