"""Two processes learn what one learns from all of their data; none waits for another for ever."""

import io
import os
import socket
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import X, batches, net, same_bits
from torch import Tensor, multiprocessing, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit.distill import Distillation, Teacher
from normswap.fit.learn import learn
from normswap.fit.outputs import Part
from normswap.fit.processes import Processes
from normswap.fit.ranks import rank_of_this
from normswap.fit.stream import Stream
from normswap.fit.training import Settings

pytest.importorskip("accelerate")
Shares = tuple[int, int]
EQUAL, UNEQUAL = (4, 4), (6, 2)  # of each batch of 8


def share(shares: Shares = EQUAL) -> list[tuple[Tensor, Tensor]]:
    """What this process reads: its part of each batch, or all where it is alone."""
    if "RANK" not in os.environ:
        return batches()
    rank = int(os.environ["RANK"])
    return [(x.split(shares)[rank], y.split(shares)[rank]) for x, y in batches()]


def finetuned(data: Iterable[Any], **options: Any) -> nn.Module:
    model = net()
    model.drop.p = 0.0
    return ns.finetune(model, data, **{"steps": 4, "lr": 0.1, **options})


def student_and_teacher() -> tuple[nn.Module, nn.Module]:
    teacher = net().eval()
    return ns.convert(teacher, "layer_norm", inputs=X[:2]), teacher


def recovered(data: Iterable[Any], **options: Any) -> nn.Module:
    # By name, as what an output is, and how it varies, is that of the first process.
    return ns.recover(*student_and_teacher(), data, **{"steps": 3, "loss": "kl", **options})


def distilled(data: Iterable[Any], accumulate: int = 1) -> nn.Module:
    """Steps of SGD with recover's loss, so that the weights tell its gradients."""
    student, teacher = student_and_teacher()
    told = Teacher(teacher, ["blocks.0", "blocks.1"], ())
    learn(
        student,
        lambda model: Distillation(model, told, 1.0, [Part("", "logits", 1)]),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda step: 1.0,
        Stream(data),
        Settings(steps=3, accumulate=accumulate),
        Processes(),
        title="distilling",
        about={},
    )
    return student


RUNS: dict[str, Callable[[], nn.Module]] = {
    "distilled": lambda: distilled(share()),
    "distilled, unequal": lambda: distilled(share(UNEQUAL)),
    "finetuned": lambda: finetuned(share()),
    "finetuned, unequal, clipped": lambda: finetuned(share(UNEQUAL), clip=0.1),
    "tune mode": lambda: finetuned(share(), statistics="tune"),
    "growing rate": lambda: finetuned(share(), schedule="exponential", weight_decay=1e-3),
    "recovered": lambda: recovered(share(UNEQUAL)),
}
# Four batches, two by two; the reference has them in one.
ACCUMULATED: dict[str, Callable[..., nn.Module]] = {
    "distilled": distilled,
    "finetuned": lambda data, **options: finetuned(data, clip=0.1, **options),
}


def updated() -> nn.Module:
    return finetuned(share(), statistics="update")


class Stopped(BaseException):
    pass


def stopped_and_resumed(folder: Path) -> nn.Module:
    """All processes fail at the same batch, and go on."""
    data = share()

    def failing() -> Iterable[Any]:
        yield from data * 2
        raise Stopped

    options = {"statistics": "update", "steps": 14, "checkpoint": folder, "save_every": 3}
    with pytest.raises(Stopped):
        finetuned(failing(), **options)
    return finetuned(iter(data * 9), resume=True, **options)


def uninterrupted() -> nn.Module:
    return finetuned(iter(share() * 9), statistics="update", steps=14)


def without_data() -> nn.Module:
    return finetuned(share() if rank_of_this() == 0 else [])


def recovered_without_data() -> nn.Module:
    return recovered(share() if int(os.environ["RANK"]) == 0 else [])


def ending_early() -> nn.Module:
    return finetuned(iter(share()[: 3 - int(os.environ["RANK"])]))


def synchronized() -> nn.Module:
    return finetuned(share(), statistics="update", sync_batch_norm=True)


def unwritable(folder: Path) -> nn.Module:
    (folder / "file").touch()
    return finetuned(share(), checkpoint=folder / "file" / "below")


def _sharded() -> None:
    """Let accelerate do what it does under --use_fsdp --fsdp_version 2, which it asks a GPU for."""
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Sharding(accelerate.Accelerator):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, cpu_ram_efficient_loading=True
            )

    accelerate.Accelerator = Sharding


def _work(rank: int, port: int, folder: Path, sharded: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sharded:
        _sharded()
    cases = {
        **RUNS,
        **{
            f"{name}, twice": lambda run=run: run(share(UNEQUAL)[:4], accumulate=2)
            for name, run in ACCUMULATED.items()
        },
        "updated": updated,
        "resumed": lambda: stopped_and_resumed(folder / "run"),
        "uninterrupted": uninterrupted,
        "without data": without_data,
        "recovered without data": recovered_without_data,
        "ending early": ending_early,
        "synchronized": synchronized,
        "unwritable": lambda: unwritable(folder),
    }
    found: dict[str, Any] = {}
    for name, run in cases.items():
        with warnings.catch_warnings(record=True) as told, redirect_stderr(io.StringIO()) as err:
            warnings.simplefilter("always")
            try:
                model = run()
                assert all(type(p) is nn.Parameter for p in model.parameters())
                found[name] = model.state_dict()
            except NormswapError as error:
                found[name] = str(error)
        found[f"{name}: stderr"] = err.getvalue()
        found[f"{name}: warnings"] = [str(each.message) for each in told]
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=[False, True], ids=["DDP", "FSDP2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the first and the second process found, case by case."""
    folder = tmp_path_factory.mktemp("both")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked ones of FSDP have waited for each other for ever, and accelerate in a process that used
    # it before knows of no others.
    multiprocessing.spawn(_work, (port, folder, request.param), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def agree(both: list[Any], name: str, expected: nn.Module, within: float = 1e-5) -> None:
    first, second = (found[name] for found in both)
    assert same_bits(first, second)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=within, atol=within, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(name: str, both: list[Any]) -> None:
    # Calibration ends where the moments hardly move, and they come in another order.
    agree(both, name, RUNS[name](), 1e-3 if name == "recovered" else 1e-5)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_so_they_do_with_accumulated_gradients(name: str, both: list[Any]) -> None:
    agree(both, f"{name}, twice", ACCUMULATED[name](batches(16)[:2]))


def test_statistics_of_the_batch_are_those_of_the_first_process(both: list[Any]) -> None:
    assert same_bits(both[0]["updated"], both[1]["updated"])
    assert not same_bits(both[0]["updated"], both[0]["finetuned"])
    (said,) = [each for each in both[0]["updated: warnings"] if "statistics of" in each]
    assert "compute statistics of 4 samples, which are too few" in said


def test_a_stopped_run_goes_on_to_the_same_bits(both: list[Any]) -> None:
    for found in both:
        assert same_bits(found["resumed"], found["uninterrupted"])


def test_other_batches_in_other_processes_are_warned_of_once(both: list[Any]) -> None:
    first, second = (found["distilled, unequal: warnings"] for found in both)
    assert [each for each in first if "batches of 6, 2 samples" in each]
    assert not [each for each in second if "samples" in each]
    assert not [each for each in both[0]["distilled: warnings"] if "samples" in each]


@pytest.mark.parametrize("name", ["without data", "recovered without data"])
def test_a_process_without_data_ends_all(name: str, both: list[Any]) -> None:
    first, second = (found[name] for found in both)
    assert first == "process 1 failed; its message says why"
    assert second == "there is no batch; pass data that yields at least one"


def test_data_that_end_early_in_one_process_end_all(both: list[Any]) -> None:
    first, second = (found["ending early"] for found in both)
    assert first == "process 1 failed; its message says why"
    assert "the data ended after 2 batches and cannot be read again" in second


def test_a_checkpoint_that_cannot_be_written_ends_all(both: list[Any]) -> None:
    first, second = (found["unwritable"] for found in both)
    assert "cannot write to" in first and "cannot write to" in second  # each looks, before all work


def test_synchronized_statistics_without_a_gpu_are_refused(both: list[Any]) -> None:
    for found in both:
        assert "sync_batch_norm is torch's SyncBatchNorm, which needs GPUs" in found["synchronized"]


def test_only_the_first_process_shows_its_progress(both: list[Any]) -> None:
    assert "fine-tuning: 4/4" in both[0]["finetuned: stderr"]
    assert "fine-tuning" not in both[1]["finetuned: stderr"]
