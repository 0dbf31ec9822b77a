"""Two processes give what one gives, whatever share of the data each has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import Residual, randomise
from torch import Tensor, distributed, multiprocessing, nn

import normswap as ns
from normswap.errors import NormswapError
from normswap.fit.calibrate import calibrate
from normswap.fit.reestimate import reestimate

X = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
# How many images each of two processes has, in batches of 8.
SHARES = {"equal": (30, 30), "unequal": (47, 13), "one has none": (60, 0)}


def reestimated(batches: list[Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return reestimate(randomise(Residual()), batches)


def calibrated(batches: list[Tensor]) -> nn.Module:
    torch.manual_seed(0)
    teacher = randomise(Residual())
    student = ns.convert(teacher, "layer_norm", inputs=X[:2])
    return calibrate(student, teacher, batches)


def failing(batches: list[Tensor]) -> nn.Module:
    """The first process has an image that is not finite."""
    if distributed.get_rank() == 0:
        batches = [*batches, torch.full_like(X[:2], torch.nan)]
    return reestimated(batches)


def _work(
    rank: int, fit: Callable[[list[Tensor]], nn.Module], shares: tuple[int, int], folder: Path
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    own = X.split(shares)[rank]
    try:
        torch.save(fit([*own.split(8)] if len(own) else []).state_dict(), folder / f"{rank}.pt")
    except NormswapError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    distributed.destroy_process_group()


def in_two(fit: Callable[[list[Tensor]], nn.Module], shares: tuple[int, int], folder: Path) -> None:
    multiprocessing.spawn(_work, (fit, shares, folder), nprocs=2)


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("fit", [reestimated, calibrated])
def test_two_processes_give_what_one_gives(
    fit: Callable[[list[Tensor]], nn.Module], shares: tuple[int, int], tmp_path: Path
) -> None:
    in_two(fit, shares, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = fit([*X.split(8)]).state_dict()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6)


def test_an_error_in_one_process_ends_both(tmp_path: Path) -> None:
    in_two(failing, (30, 30), tmp_path)
    assert "not finite" in (tmp_path / "0.txt").read_text()
    assert "process 0 failed" in (tmp_path / "1.txt").read_text()
