"""Text and paths that Python and the libraries below it read alike."""

import errno
import os
import sys
from pathlib import Path

from normswap.core.errors import NormswapError
from normswap.core.shown import LONGEST_NAME, shown


def check_path(path: str | Path) -> None:
    """Raise unless `path` is the same file for the libraries that read and write models.

    safetensors, ONNX and ONNX Runtime take paths as UTF-8; Python encodes them as the locale says.

    Raises:
        NormswapError: they would not find the file, or another one.
    """
    text = os.fspath(path)
    check_text(text)
    if "\0" in text:
        raise NormswapError(f"the path {text!a} has a null byte in it; name another")
    try:
        same = os.fsencode(text) == text.encode()
    except UnicodeEncodeError:  # the locale has no such character
        same = False
    if not same:
        raise NormswapError(f"the path {text!a} {_remedy()}")


def check_reachable(path: str | Path) -> None:
    """As `check_path`, and raise unless the system can say whether something is there.

    Raises:
        NormswapError: the path is too long for it, or this user may not look into a folder on it.
    """
    check_path(path)
    try:
        Path(path).stat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
            raise NormswapError(
                f"cannot use the path {shown(path, LONGEST_NAME)!r}: {error.strerror}; name another"
            ) from error


def check_text(text: str) -> None:
    """Raise unless `text`, which came from the system, is text: it goes into reports.

    Raises:
        NormswapError: some of its bytes are no characters, so that Python has put surrogates there.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NormswapError(f"{text!a} {_remedy()}") from None


def _remedy() -> str:
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return "is not UTF-8; rename it"
    return f"cannot be used where the locale's encoding is {encoding}; set PYTHONUTF8=1"
