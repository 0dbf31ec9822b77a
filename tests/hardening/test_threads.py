"""Verbs in several threads and processes at once: each model as if it were alone."""

import multiprocessing
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from process_state import ambient_state, differences, state_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap as ns
from normswap.core.ambient import alone, generators_kept, warnings_ignored
from normswap.deploy.translate import quiet
from normswap.graph.capture import capture
from normswap.graph.exporting import tracing

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def net(seed: int) -> nn.Module:
    """A network whose width, depth and numbers depend on `seed`."""
    generator = torch.Generator().manual_seed(seed)
    width = 4 + 2 * (seed % 3)
    made: list[nn.Module] = []
    for before in (3, *[width] * (1 + seed % 2)):
        made += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    made += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4), nn.LayerNorm(4)]
    model = nn.Sequential(*made, nn.Linear(4, 3)).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.9, generator=generator)
    return model


class Branching(nn.Module):
    """torch.export fails on it, and prints the graph so far; its parts are captured."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if y.sum() > 0 else -y  # type: ignore[no-any-return]


def _exported(model: nn.Module, folder: Path) -> Any:
    path = folder / f"{threading.get_ident()}.onnx"
    ns.export(model, X, path, validate=False)
    return path.read_bytes()


VERBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "fold": lambda model, _: ns.fold(model, X),
    "branching": lambda model, _: ns.fold(Branching(model), X, inplace=True),
    "convert": lambda model, _: ns.convert(model, "group_norm", inputs=X, groups=2),
    "tune": lambda model, _: ns.freeze(model, X, mode="tune"),
    "center": lambda model, _: ns.center(model, X),
    "fold_gains": lambda model, _: ns.fold_gains(model, X),
    "rescale": lambda model, _: ns.rescale(model, X, [X], limit=0.5),
    "rotate": lambda model, _: ns.rotate(model, X),
    "parametrize": lambda model, _: ns.parametrize(model, "spectral_norm"),
    "inspect": lambda model, _: ns.inspect(model, X).to_dict(),
    "export": lambda model, folder: _exported(model, folder),
}


def told(result: Any) -> Any:
    return state_of(result, itself=False) if isinstance(result, nn.Module) else result


def test_eight_threads_do_what_one_does_and_leave_the_process_as_it_was(tmp_path: Path) -> None:
    verbs = list(VERBS.values())
    nets = [[net(seed) for seed in range(len(verbs))] for _ in range(2)]
    expected = [told(do(model, tmp_path)) for do, model in zip(verbs, nets[0], strict=True)]
    before = ambient_state()
    with ThreadPoolExecutor(len(verbs)) as pool:
        together = [
            pool.submit(do, model, tmp_path) for do, model in zip(verbs, nets[1], strict=True)
        ]
        found = [told(each.result()) for each in together]
    assert differences(before, ambient_state()) == []
    for name, one, other in zip(VERBS, expected, found, strict=True):
        assert one == other, name


def test_a_forward_of_another_model_sees_nothing_of_a_capture() -> None:
    """torch.fx replaces nn.Module.__call__ for all threads while it traces."""
    other, stop, failures = net(1), threading.Event(), list[Any]()
    expected = other(X)

    def serve() -> None:
        while not stop.is_set():
            try:
                # Not to the bit: torch.export lets convolutions of other threads round otherwise.
                torch.testing.assert_close(other(X), expected)
            except Exception as error:  # whatever the tracer makes of it
                failures.append(error)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        capture(net(0), X)
        for _ in range(10):
            capture(net(0))  # symbolic
    finally:
        stop.set()
        serving.join()
    assert failures == []


def test_checkpoints_of_another_thread_are_kept_during_a_capture() -> None:
    kept: list[int] = []

    class Counts(nn.Module):
        """Runs another thread's training step when it is captured."""

        def __init__(self) -> None:
            super().__init__()
            self.body = net(0)

        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
            return self.body(x)  # type: ignore[no-any-return]

    def train() -> None:
        for reentrant in (False, True):
            calls: list[int] = []

            def block(y: Tensor, calls: list[int] = calls) -> Tensor:
                calls.append(1)
                return y.sin().exp()

            x = torch.ones(3, requires_grad=True)
            checkpoint(block, x, use_reentrant=reentrant).sum().backward()  # type: ignore[no-untyped-call]
            kept.append(len(calls))

    assert capture(Counts(), X).how == "export"
    assert set(kept) == {2}  # each block ran again in backward


def test_warnings_of_other_threads_are_heard_while_this_one_ignores_its_own() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with warnings_ignored():
            warnings.warn("mine", stacklevel=1)
            thread = threading.Thread(target=lambda: warnings.warn("another's", stacklevel=1))
            thread.start()
            thread.join()
            with warnings_ignored(FutureWarning):
                warnings.warn("mine", FutureWarning, stacklevel=1)
            warnings.warn("mine", stacklevel=1)
        assert warnings.filters == before
        warnings.warn("mine again", stacklevel=1)
    assert [str(each.message) for each in heard] == ["another's", "mine again"]


def test_another_thread_that_puts_filters_back_later_does_not_bring_ours_to_life() -> None:
    entered, leave = threading.Event(), threading.Event()

    def catches() -> None:
        with warnings.catch_warnings():
            entered.set()
            leave.wait(30)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        thread = threading.Thread(target=catches)
        with warnings_ignored():
            thread.start()
            assert entered.wait(30)
        leave.set()
        thread.join()
        warnings.warn("heard", stacklevel=1)
    assert [str(each.message) for each in heard] == ["heard"]


def test_what_another_thread_prints_and_logs_during_an_export_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with quiet():
        print("of the exporter")
        print("of the exporter", file=sys.stderr)
        for stream in (None, sys.stderr):
            thread = threading.Thread(target=lambda stream=stream: print("shown", file=stream))
            thread.start()
            thread.join()
    assert capsys.readouterr() == ("shown\n", "shown\n")


def test_random_numbers_that_a_check_seeds_are_no_other_threads() -> None:
    """A thread that takes note of the generators waits while another has seeded them."""
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    seeded, noted = threading.Event(), threading.Event()

    def notes() -> None:
        seeded.wait(30)
        with generators_kept():
            noted.set()

    thread = threading.Thread(target=notes)
    thread.start()
    with alone(), generators_kept():
        torch.manual_seed(0)
        seeded.set()
        assert not noted.wait(0.2)
    thread.join()
    assert torch.equal(torch.get_rng_state(), expected)


# --- processes ------------------------------------------------------------------------------------


def folded_alike() -> None:
    """Fold, and compare with what the model computes."""
    model = net(0)
    result = ns.fold(model, X)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in result.modules())
    torch.testing.assert_close(result(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_forked_child_folds_after_its_parent_has() -> None:
    folded_alike()
    assert children.child(folded_alike) == 0


def test_a_fork_waits_until_another_thread_has_left_what_it_changed() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def holds() -> None:
        with tracing():
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=holds)
    thread.start()
    assert inside.wait(30)
    threading.Timer(0.3, go_on.set).start()
    begun = time.monotonic()
    status = children.child(folded_alike)
    thread.join()
    assert status == 0
    assert time.monotonic() - begun >= 0.3


def test_a_child_forked_by_who_is_inside_can_be_inside_as_well() -> None:
    def use() -> None:
        with alone():
            folded_alike()

    with alone():
        assert children.child(use) == 0
    thread = threading.Thread(target=folded_alike)
    thread.start()
    thread.join()


def test_a_spawned_child_folds() -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=folded_alike)
    process.start()
    process.join(120)
    assert process.exitcode == 0
