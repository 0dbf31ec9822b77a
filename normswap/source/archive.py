"""What reading the files of torch may cost: about as much memory as they are long, and no more.

torch's archives are zips whose members are not compressed. A file that was packed again, or whose
members overlap, can claim terabytes in a few bytes. So can one pickle among those that
`weights_only` lets through, a bytearray of any length.
"""

from typing import IO, Any
from zipfile import ZipFile

import torch

from normswap.errors import NormswapError

_BYTEARRAY = b"\nbytearray\n"  # as the unpickler of weights_only reads a global's name


def check_archive(reader: Any, file: IO[bytes], name: str) -> None:
    """Raise unless all that torch's `reader` of the archive `file` can get is in the file.

    Raises:
        NormswapError: its members are compressed, or overlap; `name` is what it is called then.
    """
    if hasattr(reader, "get_record_size"):
        size = sum(reader.get_record_size(member) for member in reader.get_all_records())
    else:  # an older torch
        size = sum(member.file_size for member in ZipFile(file).infolist())
    if size > file.seek(0, 2):
        raise NormswapError(
            f"{name} is compressed and would take {size:,} bytes of memory; write it again with "
            "torch, which does not compress"
        )


def check_saved(file: IO[bytes], name: str) -> None:
    """Raise unless `file`, which `torch.save` wrote, takes about as much memory as it is long.

    Raises:
        NormswapError: as `check_archive`, or it makes a bytearray.
    """
    head = file.read(2)
    file.seek(0)
    if head == b"PK":
        reader = torch._C.PyTorchFileReader(file)
        check_archive(reader, file, name)
        pickled = reader.get_record("data.pkl")
    else:
        pickled = file.read()
    if _BYTEARRAY in pickled:
        raise NormswapError(
            f"{name} holds more than tensors (a bytearray); save model.state_dict() instead"
        )
