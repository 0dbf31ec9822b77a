"""The journal of a folder: several files in it change as one, whenever their writer is killed.

Each file changes by a rename, which is atomic, but several take several renames. So a writer first
has all new files complete in a folder of its own, inside the one to be changed:

    .normswap-INODE-RANDOM.journal/
        files/          the new files, complete until the last of them is in its place
        old/            second names (hard links) of those that they replace
        next/           second names of new ones, which are renamed into their places
        manifest.json   the new files with their hashes, and the names that are removed

The rename that gives it this name is the moment at which the folder changes. From then on it is
read as `files/` says (`located`), also where the writer was killed before it had moved them, and
who writes there next moves the rest (`settle`). Reading writes nothing.

A journal of somebody else must not choose what is in the folder. INODE is the output folder's, and
the manifest has those of the journal and of every file: nobody can choose them, so that what comes
in an archive or is copied from elsewhere does not fit. It is settled by the user who made it alone,
and only if nobody else could change it. In a folder like /tmp, with the sticky bit, where others
may make files but not replace ours, their journals are not even looked at.
"""

import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from normswap.core import locks
from normswap.core.errors import NormswapError

FILES = "files"
_MANIFEST = "manifest.json"
_LONGEST_MANIFEST = 2**20  # bytes
_SCRATCH = re.compile(r"\.normswap-(\d+)-[a-z0-9_]{8}")
_SUFFIX = ".journal"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NOT_OURS = "in it belongs to another user or group, which a new one would not"
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    inode: int
    mode: int
    uid: int
    gid: int
    sha256: str

    @classmethod
    def of(cls, status: os.stat_result, sha256: str) -> "_File":
        mode = stat.S_IMODE(status.st_mode)
        uid, gid = status.st_uid, status.st_gid
        return cls(inode=status.st_ino, mode=mode, uid=uid, gid=gid, sha256=sha256)

    def is_of(self, status: os.stat_result) -> bool:
        """Whether this is the same file, and no others may write to it now than might before."""
        more = status.st_mode & _BY_OTHERS & ~self.mode
        same = (status.st_ino, status.st_uid, status.st_gid) == (self.inode, self.uid, self.gid)
        return stat.S_ISREG(status.st_mode) and same and not more


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    journal: int
    files: dict[str, _File]
    gone: tuple[str, ...]


class _Unfit(Exception):
    """What of a journal is not as its writer left it."""


def located(path: Path) -> Path:
    """Where the file `path` is to be read: in the journal of its folder, if that has or removes it.

    Raises:
        NormswapError: there is a journal that is damaged, or was made for another folder.
    """
    for each in dict.fromkeys((path, Path(os.path.realpath(path)))):
        for journal in _journals(each.parent):
            manifest = _trusted(journal)
            if manifest is not None and each.name in (*manifest.files, *manifest.gone):
                return journal / FILES / each.name
    return path


def settle(directory: Path) -> None:
    """Complete what a writer that was killed had begun in `directory`, whose lock is held.

    Raises:
        NormswapError: what it left belongs to another user, is damaged, or is of another folder.
    """
    check_own(directory)
    for journal in _journals(directory):
        manifest = _trusted(journal)
        if manifest is not None:
            _move(journal, manifest)
            journal.rename(journal.with_name(journal.name.removesuffix(_SUFFIX)))  # that is dead
    remove_dead(directory)


def named(folder: Path, random: str = "") -> str:
    """The name of a scratch folder in `folder`; without the `random` part, how it begins."""
    return f".normswap-{folder.stat().st_ino}-{random}"


def check_own(directory: Path) -> None:
    """Raise unless every journal in `directory`, if there is one, is this user's.

    Raises:
        NormswapError: one is another user's. What is written now would be undone by it.
    """
    for journal in _journals(directory):
        with suppress(FileNotFoundError):
            owner = journal.lstat().st_uid
            if owner != user():
                raise NormswapError(
                    f"a writer of user {owner} was killed while it changed {str(directory)!r}; "
                    f"let this user write there once, or remove {journal.name!r} from it"
                )


def commit(scratch: Path, directory: Path, gone: Sequence[str]) -> None:
    """Move the files of `scratch`, which lies in `directory`, there, and remove those of `gone`.

    All or none; each has the mode and the owner of the file that it replaces.

    Raises:
        NormswapError: as `settle`, or somebody else holds the lock of `directory`.
        OSError: the first that occurs; `directory` is as it was.
    """
    new = {each.name: each for each in sorted((scratch / FILES).iterdir()) if each.is_file()}
    gone = [name for name in gone if name not in new and os.path.lexists(directory / name)]
    one = len(new) == 1 and not gone
    hashes = {name: "" if one else _hash(file) for name, file in new.items()}
    with locks.locked(directory):
        settle(directory)  # else that would be done later, over what comes now
        for name in (*new, *gone):
            check_place(directory / name, scratch)
        for name, file in new.items():
            take_over(file, directory / name)
        if one:
            for name, file in new.items():
                file.replace(directory / name)
            return
        files = {name: _File.of(file.lstat(), hashes[name]) for name, file in new.items()}
        manifest = _Manifest(journal=scratch.lstat().st_ino, files=files, gone=tuple(gone))
        (scratch / _MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        (scratch / "old").mkdir(mode=0o700)
        for name in (*new, *gone):
            if os.path.lexists(directory / name):
                _duplicate(directory / name, scratch / "old" / name)
        _change(scratch, directory, manifest)


def check_place(path: Path, scratch: Path) -> None:
    """Raise unless a file can take the place of `path` and its owner; `scratch` has that of ours.

    Raises:
        OSError: a folder is there, or a file of another user or group.
    """
    if not os.path.lexists(path):
        return
    old, own = path.lstat(), scratch.lstat()
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, f"{path.name} is a folder in it")
    if not stat.S_ISREG(old.st_mode) or user() == 0:
        return
    if old.st_uid != own.st_uid or old.st_gid not in (own.st_gid, os.getegid(), *os.getgroups()):
        raise PermissionError(errno.EPERM, f"{path.name} {_NOT_OURS}")


def remove_dead(home: Path) -> None:
    """Remove what writers of this user that were killed were still writing in `home`."""
    for scratch in _entries(home, ""):
        with suppress(OSError):
            status = scratch.lstat()
            if status.st_uid != user() or status.st_mode & _BY_OTHERS:
                continue
            lock = locks.lock_of(scratch)
            if lock is None:  # its writer lives
                continue
            try:
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(lock)


def _change(scratch: Path, directory: Path, manifest: _Manifest) -> None:
    """Let the journal hold, move the files, and let go of it; on an error move them back."""
    # An overlay may give a folder another inode when the first is written to it.
    journal = directory / (named(directory, scratch.name[-8:]) + _SUFFIX)
    whole = journal if _opened_up(scratch, directory) else scratch
    try:
        scratch.rename(whole)
        _move(whole, manifest)
        whole.rename(scratch)  # which the caller removes
    except BaseException:
        if os.path.lexists(whole):
            # Killed in here, it is completed after all.
            _move_back(whole, manifest)
            whole.rename(scratch)
        raise


def _opened_up(scratch: Path, directory: Path) -> bool:
    """Let others read `scratch` who may read `directory`; whether only its owner may change it.

    On a file system that knows no owners and modes nobody could trust it as a journal: it is none
    there, and a writer that is killed while it moves files leaves some of the old and of the new.
    """
    mode = directory.stat().st_mode & 0o777 & ~_BY_OTHERS | stat.S_IRWXU
    with suppress(PermissionError):
        for each in (scratch, scratch / FILES):
            each.chmod(mode)
        (scratch / _MANIFEST).chmod(mode & 0o666)
    try:
        _check_private(scratch)
    except _Unfit:
        return False
    return scratch.lstat().st_uid == user()


def _move_back(whole: Path, manifest: _Manifest) -> None:
    for name in (*manifest.files, *manifest.gone):
        if os.path.lexists(whole / "next" / name):
            continue  # it has not been moved
        if os.path.lexists(whole / "old" / name):
            (whole / "old" / name).replace(whole.parent / name)
        else:
            (whole.parent / name).unlink(missing_ok=True)


def _move(journal: Path, manifest: _Manifest) -> None:
    """Give each file its place; those in the journal stay, for whoever reads them there."""
    following = journal / "next"
    following.mkdir(mode=0o700, exist_ok=True)
    for name in manifest.files:
        (following / name).unlink(missing_ok=True)
        _duplicate(journal / FILES / name, following / name)
    for name in manifest.files:
        (following / name).replace(journal.parent / name)
    for name in manifest.gone:
        (journal.parent / name).unlink(missing_ok=True)


def take_over(file: Path, target: Path) -> None:
    """Give `file` the mode and the owner of `target`; the mode of a new file, if there is none.

    Raises:
        OSError: this user may not give files to that owner.
    """
    old = target.lstat() if os.path.lexists(target) else None
    if old is not None and stat.S_ISREG(old.st_mode):
        mode = old.st_mode & 0o777
    else:  # as of what was just made: by the umask, or by the default of its folder
        old, mode = None, file.parent.stat().st_mode & 0o666
    # By a descriptor: where others may rename, the path may be another file by now.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        own = os.fstat(descriptor)
        ours = own.st_uid == file.parent.lstat().st_uid and own.st_nlink == 1
        if not stat.S_ISREG(own.st_mode) or not ours:
            raise PermissionError(errno.EPERM, f"{file.name} was replaced while it was written")
        if old is not None and (own.st_uid, own.st_gid) != (old.st_uid, old.st_gid):
            try:
                os.fchown(descriptor, old.st_uid, old.st_gid)
            except PermissionError as error:
                raise PermissionError(errno.EPERM, f"{file.name} {_NOT_OURS}") from error
        if own.st_mode & 0o777 != mode:
            try:
                file.chmod(mode) if sys.platform == "win32" else os.fchmod(descriptor, mode)
            except PermissionError:  # a file system may have one mode for all
                if old is not None:
                    raise
    finally:
        os.close(descriptor)


def _duplicate(file: Path, other: Path) -> None:
    """A second name for `file`; a copy, where the file system has no hard links."""
    try:
        os.link(file, other, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(file, other, follow_symlinks=False)
        own, wanted = other.lstat(), file.lstat()
        if (own.st_uid, own.st_gid) != (wanted.st_uid, wanted.st_gid):
            os.chown(other, wanted.st_uid, wanted.st_gid, follow_symlinks=False)


def _journals(folder: Path) -> list[Path]:
    return list(_entries(folder, _SUFFIX))


def _entries(folder: Path, suffix: str) -> Iterator[Path]:
    """The folders in `folder` with the names of scratch folders, or with `suffix` of journals."""
    try:
        status = folder.stat()
        names = [each.name for each in folder.iterdir()]
    except OSError:
        return
    for name in names:
        match = _SCRATCH.fullmatch(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if match is None or (not suffix and int(match[1]) != status.st_ino):
            continue
        with suppress(OSError):
            own = (folder / name).lstat()
            stranger = own.st_uid not in (user(), status.st_uid)
            if stat.S_ISDIR(own.st_mode) and not (stranger and status.st_mode & stat.S_ISVTX):
                yield folder / name


def _trusted(journal: Path) -> _Manifest | None:
    """The manifest of `journal`, all of which is as its writer left it; None if it is gone.

    Raises:
        NormswapError: it is not.
    """
    try:
        manifest = _manifest(journal)
        _check_files(journal, manifest)
    except (_Unfit, OSError) as error:
        if not os.path.lexists(journal):
            return None  # its writer, which lives, is done with it
        reason = str(error) if isinstance(error, _Unfit) else error.strerror
        raise NormswapError(
            f"{str(journal.parent)!r} holds {journal.name!r}, which is to complete the work of a "
            f"writer that was killed, and cannot be used: {reason}; remove it to take the files "
            "beside it as they are"
        ) from error
    return manifest


def _manifest(journal: Path) -> _Manifest:
    match = _SCRATCH.fullmatch(journal.name.removesuffix(_SUFFIX))
    if match is None or int(match[1]) != journal.parent.stat().st_ino:
        raise _Unfit("it was made for another folder")
    _check_private(journal)
    with (journal / _MANIFEST).open("rb") as file:
        content = file.read(_LONGEST_MANIFEST + 1)
    try:
        manifest = _Manifest.model_validate_json(content)
    except ValidationError as error:
        raise _Unfit("its manifest is damaged") from error
    for name in (*manifest.files, *manifest.gone):
        if name in ("", "..") or name != Path(name).name or "\0" in name:
            raise _Unfit("its manifest names a file elsewhere")
    return manifest


def _check_private(journal: Path) -> None:
    """Raise unless it is made of folders and files that nobody but their owner could change."""
    owner = journal.lstat().st_uid
    for name in ("", FILES, "old", "next", _MANIFEST):
        if name in ("old", "next") and not os.path.lexists(journal / name):
            continue
        status = (journal / name).lstat()
        if not (stat.S_ISREG if name == _MANIFEST else stat.S_ISDIR)(status.st_mode):
            raise _Unfit(f"a link or something else is in the place of its {name or 'folder'}")
        if status.st_mode & _BY_OTHERS or status.st_uid != owner:
            raise _Unfit("others may write to it")
    if (journal / _MANIFEST).lstat().st_nlink != 1:
        raise _Unfit(f"its {_MANIFEST} is a file elsewhere as well")


def _check_files(journal: Path, manifest: _Manifest) -> None:
    if journal.lstat().st_ino != manifest.journal:
        raise _Unfit("it is a copy")
    for name, wanted in manifest.files.items():
        file = journal / FILES / name
        same = wanted.is_of(file.lstat())
        if same:  # others may be too long to be read
            with suppress(PermissionError):  # whoever may not read it does not read it elsewhere
                same = _hash(file) == wanted.sha256
        if not same:
            raise _Unfit(f"{name} in it was changed")


def _hash(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0  # Windows gives every file the owner 0
