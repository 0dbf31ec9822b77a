"""Orthogonal matrices by which a stream is rotated, as data: a kind, a size and a seed.

A *Hadamard* matrix has entries of one size, so that it spreads a channel that is far out over all
of them evenly (Ashkboos et al. 2024, arXiv 2404.00456, section 3). The order of one is 1, 2 or a
multiple of 4. Those of order 2^k m are built by Sylvester (1867) from one of order m, and that by
Paley (1933, "On orthogonal matrices") from the squares modulo a prime: of order p + 1 for
p = 3 (mod 4), and 2 (p + 1) for p = 1 (mod 4). Where the size is no such product, the Hadamard
matrix of its power of two is combined with a random matrix of what is left.

One that keeps the vector of ones, Q 1 = 1, commutes with the mean that a LayerNorm takes off. For
a Hadamard matrix H whose first column is 1 / sqrt(n), signs D and a permutation P that both leave
the first in its place, H D P H^T is such a one; its entries are not of one size, but as those of a
random matrix.
"""

from base64 import b64decode, b64encode
from functools import lru_cache
from math import isqrt, sqrt
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from normswap.core.errors import NormswapError

OrthogonalKind = Literal["hadamard", "random", "given"]
_LARGEST = 2**16  # channels, of which the matrix takes 32 GiB


class Orthogonal(BaseModel):
    """An orthogonal matrix (C, C) in float64.

    Attributes:
        kind: "hadamard", "random" (uniform over all of them), or "given".
        size: C.
        seed: of the random signs, or numbers.
        keeps_ones: Q 1 = 1.
        numbers: of a matrix that is given, row by row, float64, little-endian, in base64.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: OrthogonalKind
    size: Annotated[int, Field(ge=2, le=_LARGEST)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    keeps_ones: bool = False
    numbers: str | None = None

    @classmethod
    def given(cls, matrix: Tensor) -> "Orthogonal":
        """The one with these numbers, (C, C)."""
        held = matrix.detach().cpu().double().contiguous().numpy().astype("<f8").tobytes()
        return cls(kind="given", size=len(matrix), numbers=b64encode(held).decode())

    def matrix(self) -> Tensor:
        """Q, (C, C), in float64 on the CPU.

        Raises:
            NormswapError: numbers that are given are not those of an orthogonal matrix.
        """
        return _matrix(self)


@lru_cache(maxsize=2)
def _matrix(of: Orthogonal) -> Tensor:
    if of.kind == "given":
        return _given(of)
    generator = torch.Generator().manual_seed(of.seed)
    if of.kind == "random":
        return _random(of.size, generator, keeps_ones=of.keeps_ones)
    basis = _spread(of.size, generator)
    signs = torch.randint(0, 2, (of.size,), generator=generator).double() * 2 - 1
    if not of.keeps_ones:
        return basis.mul_(signs)
    signs[0] = 1
    order = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(of.size - 1, generator=generator)])
    return (basis * signs) @ basis[:, order].T


def _given(of: Orthogonal) -> Tensor:
    held = b64decode(of.numbers or "")
    if len(held) != 8 * of.size**2:
        raise NormswapError("the plan holds another matrix than it says; plan it anew")
    matrix = torch.frombuffer(bytearray(held), dtype=torch.float64).view(of.size, of.size)
    if not torch.allclose(matrix @ matrix.T, torch.eye(of.size, dtype=torch.float64), atol=1e-10):
        raise NormswapError("the matrix that the plan holds is not orthogonal; plan it anew")
    return matrix


def _random(size: int, generator: torch.Generator, *, keeps_ones: bool) -> Tensor:
    """A matrix drawn uniformly, (C, C)."""
    if keeps_ones:
        basis, inner = _with_ones(size, generator), torch.eye(size, dtype=torch.float64)
        inner[1:, 1:] = _random(size - 1, generator, keeps_ones=False)
        return basis @ inner @ basis.T
    numbers = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return _orthonormal(numbers)


def _with_ones(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix whose first column is 1 / sqrt(C), (C, C)."""
    columns = torch.randn(size, size, dtype=torch.float64, generator=generator)
    columns[:, 0] = 1
    return _orthonormal(columns)


def _orthonormal(columns: Tensor) -> Tensor:
    q, r = torch.linalg.qr(columns)
    signed: Tensor = q * r.diagonal().sign()
    return signed


def _spread(size: int, generator: torch.Generator) -> Tensor:
    """As `_with_ones`, with entries as equal as is known here, (C, C)."""
    power = size & -size
    for doublings in range(power.bit_length()):
        matrix = _hadamard(size >> doublings)
        if matrix is not None:
            break
    else:
        matrix, doublings = _with_ones(size // power, generator), power.bit_length() - 1
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / sqrt(2)
    for _ in range(doublings):
        matrix = torch.kron(two, matrix.contiguous())
    return matrix


def _hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix over the root of its order, its first column positive; None if unknown.

    It is known for order 1 and by Paley (1933), sections 2 and 3.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and order % 4 == 0:
        skew = _bordered(order - 1)
        skew[1:, 0] = -1
        matrix = skew + torch.eye(order, dtype=torch.float64)
    elif order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2) % 4 == 2:
        conference = _bordered(order // 2 - 1)
        diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        other = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        identity = torch.eye(order // 2, dtype=torch.float64)
        matrix = torch.kron(conference, other) + torch.kron(identity, diagonal)
    else:
        return None
    return matrix * matrix[:, :1] / sqrt(order)


def _bordered(prime: int) -> Tensor:
    """The quadratic character of i - j modulo a prime, bordered with ones, (p + 1, p + 1)."""
    numbers = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[numbers**2 % prime] = 1
    character[0] = 0
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))
