"""A zip of data, read in place and never more of it than fits in memory."""

import zipfile
from pathlib import Path

from normswap.core.errors import NormswapError

# Of others zipfile unpacks whatever a few bytes claim, all at once.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def open_zip(path: Path) -> zipfile.ZipFile:
    """The zip `path`, whose members are stored or deflated.

    Raises:
        NormswapError: it is missing, no regular file, no zip or damaged, or packed otherwise.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is no file")  # a pipe may never end
        archive = zipfile.ZipFile(path)
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise NormswapError(f"cannot read {str(path)!r}: {reason}; check the path") from error
    except Exception as error:  # zipfile has many for what is damaged
        raise NormswapError(f"{str(path)!r} is no zip, or damaged; make it again") from error
    for member in archive.infolist():
        if member.compress_type not in _BOUNDED:
            raise NormswapError(
                f"{member.filename!r} in {str(path)!r} is packed in an uncommon way; "
                "make the zip with deflate"
            )
    return archive
