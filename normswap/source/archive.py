"""What reading the files of torch may cost: about as much memory as they are long, and no more.

torch's archives are zips whose members are not compressed. A file that was packed again, or whose
members overlap, can claim terabytes in a few bytes. So can one pickle among those that
`weights_only` lets through, a bytearray of any length.
"""

import pickletools
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

from normswap.core.compat import archive_reader
from normswap.core.errors import NormswapError
from normswap.core.memory import Allowance

# What a byte of a pickle may become, in bytes: an object by its opcode, a tensor by a REDUCE.
_OF_REDUCE, _OF_CONTAINER, _OF_BYTE = 600, 64, 32
_CONTAINERS = (b"]", b"}", b"(", b"\x85", b"\x86", b"\x87")
_OLD_PICKLES = 5  # a magic number, a version, the system, the content, the keys of the storages
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


def no_checkpoint(path: Path) -> str:
    """What `path` is instead of weights alone, and what to do; "" where nothing speaks against it.

    A file of TorchScript, of torch.export or of ONNX holds a whole program.
    """
    if path.suffix == ".onnx":
        return (
            "an ONNX file, a program and not a state dict; give the weights of the model that it "
            "was exported from"
        )
    try:
        with ZipFile(path) as archive:
            below = {name.partition("/")[2] for name in archive.namelist()}
    except Exception:  # it is no zip, or a damaged one, of which its reader tells
        return ""
    if "models/model.json" in below or "serialized_exported_program.json" in below:
        return (
            "a program of torch.export, not a state dict; name it as the model, or save "
            "program.state_dict with torch.save and give that"
        )
    if any(name.startswith("code/") for name in below):
        return (
            "a TorchScript archive, a program and not a state dict; where you trust it, write "
            "torch.jit.load(path).state_dict() with torch.save and give that"
        )
    return ""


def check_saved(file: IO[bytes], name: str, allowance: Allowance) -> None:
    """Raise unless `file`, which `torch.save` wrote, takes about as much memory as it is long.

    Its tensors may still claim more than their storages hold.

    Raises:
        NormswapError: as `check_archive`, or it makes a bytearray, or more objects than is allowed.
    """
    head = file.read(2)
    file.seek(0)
    if head == b"PK":
        reader = archive_reader(file)
        check_archive(reader, file, name)
        pickled = reader.get_record("data.pkl")
    else:
        pickled = file.read()
        if _cost(pickled) > allowance.limit:  # the numbers of the tensors follow the pickles
            pickled = pickled[: _length_of_pickles(pickled)]
    allowance.check(_cost(pickled), "the objects of its pickle")
    if _BYTEARRAY in pickled:
        raise NormswapError(
            f"{name} holds more than tensors (a bytearray); save model.state_dict() instead"
        )


def _cost(pickled: bytes) -> int:
    """The bytes of memory that the objects of a pickle can take, at most."""
    containers = sum(map(pickled.count, _CONTAINERS))
    return _OF_BYTE * len(pickled) + _OF_CONTAINER * containers + _OF_REDUCE * pickled.count(b"R")


def _length_of_pickles(content: bytes) -> int:
    """How long the pickles are with which a file of torch's older format begins."""
    file, end = BytesIO(content), 0
    try:
        for _ in range(_OLD_PICKLES):
            for _ in pickletools.genops(file):
                pass
            end = file.tell()
    except Exception:  # it is damaged, which torch tells of
        return len(content)
    return end
