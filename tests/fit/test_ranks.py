"""Two processes give what one gives, whatever share of the data each has."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from children import finished, started
from networks import Residual, randomise
from torch import Tensor, distributed, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit.calibrate import calibrate
from normswap.fit.reestimate import reestimate
from normswap.fit.sweeps import EXACT

X = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
Fit = Callable[[list[Tensor]], nn.Module]
# How many images each of two processes has, in batches of 8.
SHARES = {"equal": (30, 30), "unequal": (47, 13), "one has none": (60, 0)}


def reestimated(batches: list[Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return reestimate(randomise(Residual()), batches)


def calibrated(batches: list[Tensor]) -> nn.Module:
    torch.manual_seed(0)
    teacher = randomise(Residual())
    student = ns.convert(teacher, "layer_norm", inputs=X[:2])
    return calibrate(student, teacher, batches, tolerance=EXACT)


def failing(batches: list[Tensor]) -> nn.Module:
    """The first process has an image that is not finite."""
    if distributed.get_rank() == 0:
        batches = [*batches, torch.full_like(X[:2], torch.nan)]
    return reestimated(batches)


FITS: tuple[Fit, ...] = (reestimated, calibrated)


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    for shares in SHARES.values():
        own = X.split(shares)[rank]
        for fit in FITS:
            fitted = fit([*own.split(8)] if len(own) else [])
            torch.save(fitted.state_dict(), folder / _name(fit, shares, rank))
    try:
        failing([*X.split((30, 30))[rank].split(8)])
    except NormswapError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    distributed.barrier()  # one that leaves while the other still reads from it may abort it
    distributed.destroy_process_group()


def _name(fit: Fit, shares: tuple[int, int], rank: int) -> str:
    return f"{fit.__name__}-{shares[0]}-{rank}.pt"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    pids = [started(partial(_work, rank, folder)) for rank in (0, 1)]
    assert [finished(pid) for pid in pids] == [0, 0]
    return folder


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("fit", FITS)
def test_two_processes_give_what_one_gives(
    fit: Fit, shares: tuple[int, int], written: Path
) -> None:
    first, second = (torch.load(written / _name(fit, shares, rank)) for rank in (0, 1))
    expected = fit([*X.split(8)]).state_dict()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6)


def test_an_error_in_one_process_ends_both(written: Path) -> None:
    assert "not finite" in (written / "0.txt").read_text()
    assert "process 0 failed" in (written / "1.txt").read_text()
