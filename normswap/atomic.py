"""Output that is whole or absent: write beside the target, then rename.

A rename within one file system is atomic (POSIX rename(2)), so a reader, and a run that is
interrupted at any moment, sees either the previous file or the new one.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normswap.errors import NormswapError


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield a scratch directory; on success its files replace those of `directory`, one by one.

    On any exception, Ctrl-C included, the scratch directory is removed and `directory` is as it
    was (it is not even created). Files of other names in `directory` are left alone.

    Raises:
        NormswapError: `directory` cannot be written.
    """
    directory = directory.absolute()
    home = next(parent for parent in (directory, *directory.parents) if parent.exists())
    try:
        # Not `home` itself when it is the target's distant ancestor: any existing ancestor is on
        # the file system on which the target will be made, which is all a rename needs.
        scratch = Path(tempfile.mkdtemp(prefix=".normswap-", dir=home))
    except OSError as error:
        raise _unwritable(directory, error) from error
    try:
        yield scratch
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for file in sorted(scratch.iterdir()):
                file.replace(directory / file.name)
        except OSError as error:
            raise _unwritable(directory, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path with the name of `path`; on success the file written there replaces it.

    Files written next to it (an ONNX model's external data) move along.

    Raises:
        NormswapError: the folder of `path` cannot be written.
    """
    with staged(path.absolute().parent) as scratch:
        yield scratch / path.name


def _unwritable(directory: Path, error: OSError) -> NormswapError:
    return NormswapError(
        f"cannot write to {str(directory)!r}: {error.strerror}; choose another output folder"
    )
