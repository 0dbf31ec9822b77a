"""A pass over the user's data, batch by batch: what is wrong with one is told by its number.

The data are code of the user's, or files from anywhere, so that anything can happen in them. One
line says at which batch it did, and the user's own exception is its cause.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from normswap.core.errors import NormswapError, told
from normswap.fit.batch import described, inputs_for, size_of
from normswap.fit.randomness import Apart

# An iterator is kept in memory where its batches are needed again; one that never ends would fill
# it, or run for ever. ImageNet has 1.3 million images.
MOST_KEPT = 2_000_000


class Kept(list[Any]):
    """Batches that were read before, and are told by the numbers that they had.

    Attributes:
        before: how many came before them.
        hint: as of the `Reading` that they are from.
    """

    def __init__(self, batches: Iterable[Any] = (), before: int = 0, hint: str = "") -> None:
        super().__init__(batches)
        self.before, self.hint = before, hint


@dataclass(frozen=True)
class FirstSamples:
    """The first batches of `data` that together hold at least `samples` samples."""

    data: Iterable[Any]
    samples: int

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in self.data:
            yield batch
            seen += size_of(as_tensors(batch))
            if seen >= self.samples:
                return


class Reading(Iterator[Any]):
    """The batches of `data`, their numpy arrays as tensors.

    What is drawn while they are read (an order, a crop, a flip) is drawn from random numbers of
    their own, which start where the global ones, and those of a loader, are at this moment.

    Attributes:
        number: of the batch that was read last, from 1.
        hint: what to say behind an error where single samples may have been taken for batches.
    """

    def __init__(self, data: Iterable[Any], random: Apart | None = None) -> None:
        self.number = data.before if isinstance(data, Kept) else 0
        self.hint = hint_for(data)
        self._data = data
        self._random = Apart(generators_of(data)) if random is None else random
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            NormswapError: the data fail, or what they yield is no batch or has no samples.
        """
        try:
            with self._random.drawing():
                if self._batches is None:
                    self._batches = _begun(self._data)
                batch = next(self._batches)
        except (StopIteration, NormswapError):
            raise
        except (Exception, SystemExit) as error:
            raise _failed(f"batch {self.number + 1}", error) from error
        self.number += 1
        with self.current():
            batch = as_tensors(batch)
            if not size_of(batch):
                raise NormswapError(f"it is empty, {described(batch)}; leave it out")
        return batch

    @contextmanager
    def current(self) -> Iterator[None]:
        """What fails inside is told with the number of the batch that was read last."""
        with about(f"batch {self.number}", self.hint):
            yield


@contextmanager
def about(batch: str, hint: str = "") -> Iterator[None]:
    """What fails inside, with the batch of this name, is told with its name, and `hint` behind it.

    Raises:
        NormswapError: the body did; or the memory was too small, or a worker of the loader died.
    """
    try:
        yield
    except NormswapError as error:
        if _is_of_a_worker(error.__cause__):  # not of the model's, in which it was raised
            raise _failed(batch, error.__cause__) from error.__cause__
        raise NormswapError(f"{batch}: {error}{hint}") from error.__cause__ or error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NormswapError(
            f"{batch}: out of memory ({_in_one_line(error)}); take smaller batches"
        ) from error
    except RuntimeError as error:
        # torch raises it wherever the program is when it hears that a worker died.
        if not _is_of_a_worker(error):
            raise
        raise _failed(batch, error) from error


def repeatable(data: Iterable[Any], batches: int | None = None) -> Iterable[Any]:
    """`data`; of an iterator, which can be read only once, its first `batches` in a list.

    Raises:
        NormswapError: they are no iterable, or an iterator that fails or never ends.
    """
    _check_iterable(data)
    if not isinstance(data, Iterator):
        return data
    found = []
    for batch in islice(Reading(data), batches):
        found.append(batch)
        if len(found) > MOST_KEPT:
            raise NormswapError(
                f"the data are an iterator that has not ended after {MOST_KEPT:,} batches, which "
                "are all kept in memory; pass a DataLoader, or say how many batches to read"
            )
    return found


def as_tensors(batch: Any) -> Any:
    """`batch` with tensors in the place of numpy arrays, in any nesting of it."""
    if isinstance(batch, (np.ndarray, np.generic)):
        return _tensor(np.asarray(batch))
    if isinstance(batch, Mapping):
        values = {key: as_tensors(value) for key, value in batch.items()}
        same = all(values[key] is value for key, value in batch.items())
        return batch if same else values
    if isinstance(batch, (tuple, list)):
        items = [as_tensors(value) for value in batch]
        if all(map(lambda new, old: new is old, items, batch)):
            return batch
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.kind not in "biufc":  # texts and Python objects are no numbers
        return array
    wide = {"g": np.dtype(np.float64), "G": np.dtype(np.complex128)}  # torch has none as long
    kind = wide.get(array.dtype.char, array.dtype.newbyteorder("="))
    # A copy in the usual layout: torch takes no negative strides, and warns of read-only memory.
    return torch.from_numpy(array.astype(kind, order="C", copy=True))


def generators_of(data: Any) -> list[torch.Generator]:
    """Those that a DataLoader and its samplers draw from, if they have their own."""
    held = getattr(data, "data", None)  # of something that wraps a DataLoader
    every = [data] if isinstance(held, Tensor) else [data, held]
    found = [getattr(part, "generator", None) for each in every for part in parts_of(each)]
    own = {id(each): each for each in found if isinstance(each, torch.Generator)}
    return list(own.values())


def parts_of(data: Any) -> list[Any]:
    """A DataLoader and its samplers, which order its samples; of other data, the data alone."""
    batches = getattr(data, "batch_sampler", None)
    return [data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None)]


def hint_for(data: Any) -> str:
    """What to say behind an error where single samples may have been taken for batches."""
    if isinstance(data, Kept):
        return data.hint
    if isinstance(data, FirstSamples):
        return hint_for(data.data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return "; a Dataset is read item by item: if these are samples, pass a DataLoader of it"
    if isinstance(data, (Tensor, np.ndarray, tuple)):
        kind = "tuple" if isinstance(data, tuple) else "tensor"
        return f"; a {kind} is read item by item: if it is one batch, pass it in a list"
    return ""


def _check_iterable(data: Any) -> None:
    if isinstance(data, (str, bytes)):
        raise NormswapError(
            f"data is the text {data!r:.40}; pass a list of tensors, a DataLoader, or any other "
            "iterable of batches (names of data are for the command line)"
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise NormswapError(
            f"data is {data!r:.40}, which holds no batches; pass a list of tensors, a DataLoader, "
            "or any other iterable of batches"
        )


def _begun(data: Any) -> Iterator[Any]:
    _check_iterable(data)
    if not hasattr(data, "__iter__") and hasattr(data, "__len__"):
        # By its items alone, and not every dataset raises an IndexError at its end.
        return (data[index] for index in range(len(data)))
    return iter(data)


def _failed(batch: str, error: BaseException) -> NormswapError:
    """What to say of an exception of the data."""
    if _is_of_a_worker(error):  # which reads ahead
        return NormswapError(
            f"the data failed at {batch} or one soon after: {told(error)}; see whether the memory "
            "is too small, or read them without workers"
        )
    return NormswapError(
        f"the data failed at {batch}: {_in_one_line(error)}; correct them, or leave that batch out"
    )


def _is_of_a_worker(error: BaseException | None) -> TypeGuard[RuntimeError]:
    """Whether torch says by `error` that a worker of a DataLoader died."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _in_one_line(error: BaseException) -> str:
    """What was raised; in a worker of a DataLoader, which sends its traceback as the message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if len(lines) < 2 or "Traceback" not in lines[1]:
        return told(error)
    code = [index for index, line in enumerate(lines) if line.startswith(" ")]
    return lines[min(code[-1] + 1, len(lines) - 1)] if code else told(error)


def first_inputs(model: nn.Module, data: Iterable[Any]) -> Any:
    """The first batch of `data`, as example inputs of `model`.

    Raises:
        NormswapError: there is none.
    """
    reading = Reading(data)
    for batch in reading:
        with reading.current():
            args, kwargs = inputs_for(model, batch)
        return kwargs or args
    raise NormswapError("the data hold no batch; give some that do")
