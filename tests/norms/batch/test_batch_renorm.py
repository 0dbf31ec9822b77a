"""batch_renorm: the paper's schedule of limits, and training that is eval mode where unclipped."""

import copy

import pytest
import torch
from torch import nn

import normswap as ns
from normswap.norms.batch.renorm import BatchRenorm


@pytest.mark.parametrize(
    ("batches", "r_max", "d_max"),
    [
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (10**6, 3, 5),
    ],
)
def test_schedule_is_the_papers(batches: int, r_max: float, d_max: float) -> None:
    module = BatchRenorm(3)
    module.num_batches_tracked.fill_(batches)
    assert [float(limit) for limit in module.limits()] == pytest.approx([r_max, d_max])


def test_the_first_batches_of_the_schedule_are_batch_norm() -> None:
    module, plain = BatchRenorm(3, momentum=0.1).double(), nn.BatchNorm1d(3).double()
    for _ in range(3):
        x = 5 * torch.randn(4, 3, 5, dtype=torch.float64) + 2
        torch.testing.assert_close(module(x), plain(x))
    torch.testing.assert_close(module.state_dict(), plain.state_dict())


def test_without_limits_training_computes_what_eval_mode_did() -> None:
    """r and d undo the batch's statistics: the output is that of the running ones before."""
    module = BatchRenorm(3, r_max=1e9, d_max=1e9, schedule=False).double()
    with torch.no_grad():
        for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
            tensor.uniform_(0.5, 2)
    x = 3 * torch.randn(4, 3, 5, dtype=torch.float64) + 1
    expected = copy.deepcopy(module).eval()(x)
    torch.testing.assert_close(module.train()(x), expected)


def test_one_captured_graph_serves_the_whole_schedule() -> None:
    module = BatchRenorm(3).train()
    compiled = torch.compile(
        copy.deepcopy(module), backend="aot_eager", fullgraph=True, dynamic=False
    )
    x = 4 * torch.randn(4, 3, 5)
    with torch.compiler.set_stance("default"):
        compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batches in (5_000, 20_000, 50_000):
            module.num_batches_tracked.fill_(batches)
            compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in module.state_dict().items()})
            torch.testing.assert_close(compiled(x), module(x))
    torch._dynamo.reset()


def test_a_converted_network_trusts_its_statistics_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert ns.convert(model, "batch_renorm")[1].limits() == (3.0, 5.0)
    assert ns.convert(model, "batch_renorm", r_max=2, d_max=1)[1].limits() == (2, 1)


@pytest.mark.parametrize("options", [{"r_max": 0.5}, {"d_max": -1}])
def test_impossible_limits_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ns.NormswapError, match="r_max >= 1 and d_max >= 0"):
        ns.create("batch_renorm", 3, **options)
