"""Decorrelated batch normalization: the published whitenings, and a BatchNorm's function kept."""

import copy
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normswap as ns
from normswap.norms.batch.whitening import DecorrelatedBatchNorm, inverse_sqrt
from tests.networks import ConvBN, Residual, error, in_eval, randomise

SOLVERS = ("eigh", "newton")


def published_root(covariance: Tensor, solver: str, iterations: int) -> Tensor:
    """D of one group: ZCA of arXiv 1804.08450, section 3; algorithm 1 of arXiv 1904.03441."""
    if solver == "eigh":
        values, vectors = torch.linalg.eigh(covariance)
        return vectors @ torch.diag(values**-0.5) @ vectors.T
    trace = torch.trace(covariance)
    root = torch.eye(len(covariance), dtype=covariance.dtype)
    for _ in range(iterations):
        root = (3 * root - root @ root @ root @ (covariance / trace)) / 2
    return root / trace.sqrt()


def published(norm: DecorrelatedBatchNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y in training, the mean and the projections, one group after the other."""
    size, parts, means, roots = norm.group_size, [], [], []
    for start in range(0, norm.num_features, size):
        group = x[:, start : start + size]
        rows = group.movedim(1, -1).reshape(-1, size)
        mean = rows.mean(0)
        covariance = (rows - mean).T @ (rows - mean) / len(rows)
        covariance = covariance + norm.eps * torch.eye(size, dtype=x.dtype)
        root = published_root(covariance, norm.solver, norm.iterations)
        white = ((group.movedim(1, -1) - mean) @ root.T).movedim(-1, 1)
        parts.append(white)
        means.append(mean)
        roots.append(root)
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = torch.cat(parts, 1)
    if norm.weight is not None:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y, torch.cat(means), torch.stack(roots)


def correlated(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (torch.einsum("ab,nb...->na...", mixing, x) + 2).to(dtype).contiguous()


def module(channels: int, *, seed: int = 0, **options: Any) -> DecorrelatedBatchNorm:
    """With a random affine and the running statistics of some batch."""
    norm = DecorrelatedBatchNorm(channels, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        norm(correlated(40, channels, seed=seed + 1))
    return norm


@st.composite
def cases(draw: st.DrawFn) -> tuple[DecorrelatedBatchNorm, Tensor]:
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    positions = draw(st.lists(st.integers(1, 3), max_size=3))
    # More values than channels of a group, or the eigenvectors of the reference are not unique.
    samples = draw(st.integers(3 * size + 2, 20))
    seed = draw(st.integers(0, 1000))
    norm = module(
        groups * size,
        seed=seed,
        group_size=size,
        solver=draw(st.sampled_from(SOLVERS)),
        iterations=draw(st.integers(1, 6)),
        affine=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-5, 1e-2))),
    )
    return norm, correlated(samples, groups * size, *positions, seed=seed)


@settings(deadline=None, max_examples=13)
@given(cases())
def test_training_computes_the_published_formula_and_gradient(
    case: tuple[DecorrelatedBatchNorm, Tensor],
) -> None:
    norm, x = case
    x.requires_grad_()
    inputs = [x, *norm.parameters()]
    g = torch.randn(x.shape, dtype=x.dtype)
    actual, (expected, _, _) = norm(x), published(norm, x)
    assert error(actual, expected) <= 1e-9
    ours, theirs = (torch.autograd.grad(y, inputs, g) for y in (actual, expected))
    scale = max(each.abs().max() for each in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-7 * scale


@settings(deadline=None, max_examples=8)
@given(cases())
def test_eval_uses_the_running_mean_and_projection(
    case: tuple[DecorrelatedBatchNorm, Tensor],
) -> None:
    norm, x = case
    norm.eval()
    size = norm.group_size
    rows = x.movedim(1, -1).reshape(-1, norm.num_features) - norm.running_mean
    white = torch.cat(
        [
            part @ root.T
            for part, root in zip(rows.split(size, 1), norm.running_projection, strict=True)
        ],
        1,
    )
    if norm.weight is not None:
        white = white * norm.weight + norm.bias
    expected = white.view(*x.movedim(1, -1).shape).movedim(-1, 1)
    assert error(norm(x), expected) <= 1e-12
    matrix, shift = norm.inference_matrix(torch.float64)
    mixed = torch.einsum("ab,nb...->na...", matrix, x)
    assert error(mixed.movedim(1, -1) + shift, expected.movedim(1, -1)) <= 1e-12


@pytest.mark.parametrize("size", [1, 4, 12])
def test_the_exact_root_leaves_no_correlation_within_a_group(size: int) -> None:
    norm = DecorrelatedBatchNorm(12, eps=1e-9, group_size=size).double()
    y = norm(correlated(50, 12, 3)).transpose(0, 1).reshape(12 // size, size, -1)
    expected = torch.eye(size, dtype=y.dtype).expand(12 // size, size, size)
    torch.testing.assert_close(y @ y.mT / 150, expected, rtol=0, atol=1e-6)


def test_more_iterations_come_closer_to_the_exact_root() -> None:
    x = correlated(200, 4)
    exact = DecorrelatedBatchNorm(4, group_size=4).double()(x)
    errors = [
        error(DecorrelatedBatchNorm(4, solver="newton", iterations=k).double()(x), exact)
        for k in (1, 3, 5, 9, 15)
    ]
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-6


def test_groups_of_one_are_batch_norm() -> None:
    x = correlated(9, 5, 4)
    norm = DecorrelatedBatchNorm(5, group_size=1).double()
    assert error(norm(x), F.batch_norm(x, None, None, training=True)) <= 1e-12


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("solver", SOLVERS)
def test_running_statistics_follow_the_batches(momentum: float | None, solver: str) -> None:
    norm = DecorrelatedBatchNorm(6, momentum=momentum, group_size=3, solver=solver).double()
    mean, projection = torch.zeros(6).double(), torch.eye(3).double().repeat(2, 1, 1)
    for step in range(1, 5):
        x = correlated(30, 6, 2, seed=step)
        _, batch_mean, batch_projection = published(norm, x)
        norm(x)
        weight = 1 / step if momentum is None else momentum
        mean = (1 - weight) * mean + weight * batch_mean
        projection = (1 - weight) * projection + weight * batch_projection
    assert norm.num_batches_tracked == 4
    assert error(norm.running_mean, mean) <= 1e-10
    assert error(norm.running_projection, projection) <= 1e-10
    before = copy.deepcopy(norm.state_dict())
    norm.eval()(x)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_without_running_statistics_eval_uses_the_batch() -> None:
    norm = DecorrelatedBatchNorm(4, track_running_stats=False).double()
    x = correlated(20, 4)
    assert torch.equal(norm(x), norm.eval()(x))
    assert list(norm.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_first_and_second_order(solver: str, training: bool) -> None:
    norm = module(4, group_size=2, solver=solver).train(training)
    x = correlated(3, 4, 3).requires_grad_()

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))
        return y

    inputs = (x, *norm.parameters())
    norm.momentum = 0.0  # the check calls it again and again
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_gradients_exist_where_eigenvalues_coincide() -> None:
    """There torch's derivative of an eigendecomposition is not finite."""
    root = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def of_symmetric(root: Tensor) -> Tensor:
        return inverse_sqrt(torch.eye(3).double() * 2 + (root - root.T) @ (root.T - root), 1e-5)

    zero = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_symmetric, (root,))
    assert torch.autograd.gradcheck(of_symmetric, (zero,))
    assert torch.autograd.gradgradcheck(of_symmetric, (root,))
    assert torch.autograd.gradgradcheck(of_symmetric, (zero,))

    def linear(step: Tensor) -> Tensor:
        return inverse_sqrt(torch.eye(3).double() + step + step.T, 0.0)

    assert torch.autograd.gradcheck(linear, (zero,))
    assert torch.autograd.gradgradcheck(linear, (zero,))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["few values", "constant", "large", "equal channels"])
def test_singular_covariances_give_finite_values(kind: str, solver: str) -> None:
    x = {
        "few values": correlated(3, 16, dtype=torch.float32),
        "constant": torch.full((5, 16), 3.0),
        "large": 1e4 * correlated(3, 16, 2, dtype=torch.float32),
        "equal channels": torch.randn(30, 1).expand(30, 16).clone(),
    }[kind].requires_grad_()
    y = DecorrelatedBatchNorm(16, solver=solver)(x)
    assert y.isfinite().all()
    assert torch.autograd.grad(y, x, torch.randn_like(y))[0].isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_pass_as_nan_in_their_group_only(
    value: float, solver: str
) -> None:
    """As after a BatchNorm, so that a loss scaler can skip the step."""
    x = correlated(30, 8, 2)
    x[3, 2, 1] = value
    x.requires_grad_()
    norm = DecorrelatedBatchNorm(8, group_size=4, solver=solver).double()
    y = norm(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    for each in (y, grad):
        assert each[:, :4].isnan().all() and each[:, 4:].isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_statistics_in_float32(
    dtype: torch.dtype, training: bool, solver: str
) -> None:
    x = correlated(20, 8, 3, 3).to(dtype)
    norm = module(8, solver=solver).float().train(training)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    expected = norm(x.float())
    assert inside.dtype == dtype
    error_in_steps = (inside.float() - expected).abs().max() / torch.finfo(dtype).eps
    assert error_in_steps <= 0.51 * 2 ** expected.abs().max().log2().ceil()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("rank", "memory"), [(4, torch.channels_last), (5, torch.channels_last_3d)]
)
def test_memory_format_is_kept(rank: int, memory: torch.memory_format, training: bool) -> None:
    norm = module(6).train(training)
    x = correlated(4, 6, *[3] * (rank - 2))
    y = norm(x.contiguous(memory_format=memory))
    assert y.is_contiguous(memory_format=memory)
    assert not y.is_contiguous()
    norm = module(6).train(training)
    assert norm(x).is_contiguous()
    torch.testing.assert_close(y, norm(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_tensor_of_the_inputs_size_is_kept_for_backward(solver: str) -> None:
    x = correlated(16, 8, 10, 10).requires_grad_()
    norm = module(8, solver=solver)
    large = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel() // 4:
            large.add((tensor.untyped_storage().data_ptr(), tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert [size for _, size in large] == [x.numel()]


def test_copies_states_and_pickles_are_the_same_module() -> None:
    norm, x = module(12, group_size=4, solver="newton", iterations=3), correlated(9, 12)
    loaded = DecorrelatedBatchNorm(12, group_size=4, solver="newton", iterations=3).double()
    loaded.load_state_dict(norm.state_dict())
    others = (copy.deepcopy(norm), loaded, pickle.loads(pickle.dumps(norm)))
    expected = norm(x), norm.eval()(x)
    for other in others:
        assert torch.equal(other(x), expected[0])
        assert torch.equal(other.eval()(x), expected[1])
    assert list(norm.state_dict()) == [
        "weight",
        "bias",
        "running_mean",
        "running_projection",
        "num_batches_tracked",
    ]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_without_graph_breaks(training: bool, solver: str) -> None:
    norm = module(8, solver=solver, group_size=4).train(training)
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    x = correlated(20, 8, 3).requires_grad_()
    g = torch.randn(x.shape, dtype=x.dtype)
    ours, theirs = (torch.autograd.grad(call(x), x, g)[0] for call in (compiled, norm))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_it_is_a_convolution_in_onnx(rank: int, tmp_path: Path) -> None:
    positions = [5] * (rank - 2)
    norm = module(8, group_size=4).float().eval()
    first: nn.Module = nn.Linear(3, 8) if rank == 2 else [nn.Conv1d, nn.Conv2d][rank - 3](3, 8, 1)
    report = ns.export(
        nn.Sequential(first, norm, nn.ReLU()), torch.randn(2, 3, *positions), tmp_path / "m.onnx"
    )
    assert report.passed
    assert not {"MatMul", "Sub", "Mul"} & report.operators.keys()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("affine", [True, False])
def test_convert_keeps_the_function_in_eval_mode(affine: bool, solver: str) -> None:
    model = nn.Sequential(ConvBN(3, 12), nn.Conv2d(12, 6, 3), nn.BatchNorm2d(6, affine=affine))
    model = randomise(model).double()
    x = torch.randn(4, 3, 9, 9).double()
    with torch.no_grad():
        model[0].bn.weight[0] = 0.0
        model[0].bn.weight[1] = -0.7
    model[0].bn.eps = 1e-3
    converted = ns.convert(model, "decorrelated_batch_norm", solver=solver, group_size=4)
    assert isinstance(converted[2], DecorrelatedBatchNorm)
    assert converted[2].group_size == 3
    assert error(in_eval(converted, x), in_eval(model, x)) <= 1e-12
    before = converted[2].running_projection.clone()
    converted.train()(x)
    assert not torch.equal(before, converted[2].running_projection)
    assert converted[2].num_batches_tracked == model[2].num_batches_tracked + 1


@pytest.mark.parametrize(
    "options", [{"eps": 0.1}, {"data": [correlated(9, 3, 8, 8, dtype=torch.float32)]}]
)
def test_convert_keeps_the_function_with_another_eps_and_with_data(options: dict[str, Any]) -> None:
    model = randomise(Residual()).eval()
    x = torch.randn(3, 3, 8, 8)
    converted = ns.convert(model, "decorrelated_batch_norm", **options)
    assert error(converted.eval()(x), model(x)) <= 1e-5


def test_convert_keeps_the_function_of_other_batch_methods() -> None:
    """Their eval mode is one affine per channel too, of other statistics than a variance."""
    model, x = randomise(ConvBN()).double(), torch.randn(3, 4, 6, 6).double()
    for method in ("frozen_batch_norm", "l1_batch_norm"):
        before = ns.convert(model, method)
        after = ns.convert(before, "decorrelated_batch_norm")
        assert isinstance(after.bn, DecorrelatedBatchNorm)
        assert error(in_eval(after, x), in_eval(before, x)) <= 1e-12


def test_convert_keeps_a_residual_network_and_exports_it(tmp_path: Path) -> None:
    model = randomise(Residual()).eval()
    x = torch.randn(3, 3, 8, 8)
    converted = ns.convert(model, "decorrelated_batch_norm")
    assert error(converted(x), model(x)) <= 1e-5
    assert ns.export(converted, x, tmp_path / "m.onnx").passed


def test_a_convolution_before_it_takes_its_matrix_in() -> None:
    conv = nn.Conv2d(5, 12, 3, stride=2, padding=1).double()
    norm = module(12, group_size=4).eval()
    matrix, shift = norm.inference_matrix(torch.float64)
    one = copy.deepcopy(conv)
    with torch.no_grad():
        one.weight.copy_((matrix @ conv.weight.flatten(1)).view_as(conv.weight))
        one.bias.copy_(matrix @ conv.bias + shift)
    x = torch.randn(2, 5, 9, 9).double()
    assert error(one(x), norm(conv(x))) <= 1e-12


@pytest.mark.parametrize(
    ("channels", "options", "size"),
    [
        (64, {}, 16),
        (64, {"solver": "newton"}, 64),
        (10, {"group_size": 4}, 2),
        (7, {"group_size": 4}, 1),
        (3, {}, 3),
    ],
)
def test_groups_are_the_largest_that_divide_the_channels(
    channels: int, options: dict[str, Any], size: int
) -> None:
    assert ns.create("decorrelated_batch_norm", channels, **options).group_size == size


@pytest.mark.parametrize("options", [{"solver": "qr"}, {"group_size": 0}, {"iterations": 0}])
def test_impossible_options_are_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(ns.NormswapError, match=next(iter(options))) as raised:
        ns.create("decorrelated_batch_norm", 4, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 5, 3), (1, 4), (1, 4, 1)])
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected|single value"):
        DecorrelatedBatchNorm(4)(torch.randn(shape))


def test_an_empty_batch_passes_through() -> None:
    norm = DecorrelatedBatchNorm(4)
    for mode in (True, False):
        assert norm.train(mode)(torch.randn(0, 4, 3)).shape == (0, 4, 3)
    assert norm.num_batches_tracked == 0
