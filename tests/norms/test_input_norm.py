"""Input normalization: the classical preprocessings of the whole data, however they are batched."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import normswap as ns
from normswap.norms.input_norm import InputNorm
from tests.networks import error

MIXING = ("decorrelation", "sphering", "zca")
FITTED = ("centering", "mean", "min_max", "z_score", *MIXING)
Rows = NDArray[np.float64]


def _principal(rows: Rows) -> tuple[Rows, Rows]:
    """Standard deviations and directions of the components, by the singular values of the data."""
    _, singular, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for direction in directions:
        direction *= np.sign(direction[np.abs(direction).argmax()])
    return singular / np.sqrt(len(rows)), directions


PUBLISHED: dict[str, Callable[[Rows], Rows]] = {
    "centering": lambda rows: rows - rows.mean(0),
    "mean": lambda rows: (rows - rows.mean(0)) / np.ptp(rows, axis=0),
    "min_max": lambda rows: (rows - rows.min(0)) / np.ptp(rows, axis=0),
    "z_score": lambda rows: (rows - rows.mean(0)) / rows.std(0),
    "decorrelation": lambda rows: (rows - rows.mean(0)) @ _principal(rows)[1].T,
    "sphering": lambda rows: (rows - rows.mean(0)) @ _principal(rows)[1].T / _principal(rows)[0],
    "zca": lambda rows: (
        (rows - rows.mean(0)) @ (_principal(rows)[1].T / _principal(rows)[0]) @ _principal(rows)[1]
    ),
}


def flat(x: Tensor) -> Rows:
    """(N, C, ...) as rows of channels."""
    rows: Rows = x.double().movedim(1, -1).reshape(-1, x.shape[1]).numpy()
    return rows


def published(mode: str, data: Tensor, x: Tensor) -> Tensor:
    """The formula for rows of x when fitted to data, which x is the start of."""
    rows = PUBLISHED[mode](flat(data))[: x.numel() // x.shape[1]]
    return torch.from_numpy(rows).view(x.movedim(1, -1).shape).movedim(-1, 1)


def images(samples: int, channels: int, *positions: int, seed: int = 0) -> Tensor:
    """Correlated channels with variances that are apart, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, *positions, generator=generator, dtype=torch.float64)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    mixing, _ = torch.linalg.qr(mixing)
    x = torch.einsum("ab,b,nb...->na...", mixing, 2.0 ** torch.arange(channels).double(), x)
    return (x + 5 * torch.randn(channels, *[1] * len(positions), generator=generator)).contiguous()


@st.composite
def cut_data(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """Data, and the same in batches of random sizes and order."""
    channels = draw(st.integers(1, 4))
    positions = draw(st.lists(st.integers(1, 3), max_size=3))
    data = images(draw(st.integers(10, 30)), channels, *positions, seed=draw(st.integers(0, 99)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    batches = list(data.tensor_split(cuts))
    return data, draw(st.permutations(batches))


@pytest.mark.parametrize("mode", FITTED)
@settings(deadline=None, max_examples=8)
@given(case=cut_data())
def test_any_batches_in_any_order_give_the_published_formula(
    mode: Any, case: tuple[Tensor, list[Tensor]]
) -> None:
    data, batches = case
    layer = InputNorm(data.shape[1], mode).double().fit(batches)
    assert error(layer(data), published(mode, data, data)) <= 1e-9
    assert torch.equal(layer.eval()(data[:2]), layer.train()(data[:2]))


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 99))
def test_unit_length_is_that_of_each_sample(channels: int, rest: list[int], seed: int) -> None:
    x = images(4, channels, *rest, seed=seed)
    expected = x.numpy() / np.linalg.norm(x.flatten(1).numpy(), axis=1).reshape(
        -1, 1, *[1] * len(rest)
    )
    assert error(InputNorm(channels, "unit_length")(x), torch.from_numpy(expected)) <= 1e-14


@pytest.mark.parametrize("mode", ["sphering", "zca", "decorrelation"])
def test_mixing_modes_leave_no_correlation(mode: Any) -> None:
    data = images(60, 4, 3, 3)
    y = flat(InputNorm(4, mode).double().fit([data])(data))
    covariance = np.cov(y.T, bias=True)
    if mode == "decorrelation":
        variances = np.diag(covariance)
        assert (np.diff(variances) < 0).all()
        np.testing.assert_allclose(covariance, np.diag(variances), atol=1e-9)
    else:
        np.testing.assert_allclose(covariance, np.eye(4), atol=1e-9)


@pytest.mark.parametrize("mode", FITTED)
def test_large_means_do_not_cost_accuracy(mode: Any) -> None:
    """Where sums of squares would lose every digit of the variance."""
    data = images(40, 3, 4) + 1e7
    layer = InputNorm(3, mode).double().fit(data.split(7))
    assert error(layer(data), published(mode, data, data)) <= 1e-6


@pytest.mark.parametrize("mode", [*FITTED, "unit_length"])
@pytest.mark.parametrize("kind", ["constant", "zero", "equal channels", "one sample"])
def test_degenerate_data_never_give_nan(kind: str, mode: Any) -> None:
    data = {
        "constant": torch.full((9, 3, 2), 7.0),
        "zero": torch.zeros(9, 3, 2),
        "equal channels": torch.randn(9, 1, 2).expand(9, 3, 2),
        "one sample": torch.randn(1, 3),
    }[kind].clone()
    layer = InputNorm(3, mode).fit([data])
    x = (data + torch.randn_like(data)).requires_grad_()
    y = layer(x)
    assert y.isfinite().all()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    if kind == "constant" and mode != "unit_length":
        assert (layer(data).abs() <= 1e-3).all()  # not rounding errors blown up


@pytest.mark.parametrize("mode", [*FITTED, "unit_length"])
@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_unit_of_the_data_does_not_matter(unit: float, mode: Any) -> None:
    data = images(40, 3, 2)
    y = InputNorm(3, mode).double().fit([data])(data)
    again = InputNorm(3, mode).double().fit([unit * data])(unit * data)
    assert error(again / unit if mode in ("centering", "decorrelation") else again, y) <= 1e-9


@pytest.mark.parametrize("mode", ["z_score", "mean", "min_max", "sphering"])
def test_eps_is_the_share_below_which_a_channel_is_only_centered(mode: Any) -> None:
    """A tenth, of the magnitude 100 of the channels or of their largest variance."""
    around = 0.0 if mode == "sphering" else 100.0
    data = torch.tensor([[-9.0, -60.0], [9.0, -60.0], [-9.0, 60.0], [9.0, 60.0]]).double()
    data = data / (10 if mode in ("mean", "min_max") else 1) + around
    scaled, centered = (InputNorm(2, mode, e).double().fit([data])(data) for e in (1e-9, 0.1))
    column = 1 if mode == "sphering" else 0  # components by falling variance
    start = data[:, 0].min() if mode == "min_max" else data[:, 0].mean()
    torch.testing.assert_close(centered[:, column], data[:, 0] - start)
    torch.testing.assert_close(centered[:, 1 - column], scaled[:, 1 - column])
    assert error(scaled[:, column], centered[:, column]) > 0.1


@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 3, 3)], ids=str)
def test_one_tensor_is_all_the_data(shape: tuple[int, ...]) -> None:
    """Its samples, (3, 3, 3), are no batches, though they look like some."""
    data = images(*shape)
    layer, expected = InputNorm(3).double().fit(data), InputNorm(3).double().fit([data])
    assert torch.equal(layer(data), expected(data))


def test_data_that_were_refused_leave_nothing() -> None:
    layer, first = InputNorm(3).double(), images(9, 3)
    with pytest.raises(ValueError, match="NaN"):
        layer.fit([first + 100, torch.full((2, 3), torch.nan)])
    layer.update(first)
    assert torch.equal(layer.finish()(first), InputNorm(3).double().fit([first])(first))


@pytest.mark.parametrize("mode", FITTED)
def test_the_state_dict_and_copies_hold_what_was_fitted(mode: Any) -> None:
    data = images(20, 3, 5).float()
    layer = InputNorm(3, mode).fit([data])
    loaded = InputNorm(3, mode)
    loaded.load_state_dict(layer.state_dict())
    outer = nn.Sequential(InputNorm(3, mode))
    outer.load_state_dict(nn.Sequential(layer).state_dict(), assign=True)
    for other in (loaded, outer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(data), layer(data))
    loaded.load_state_dict(InputNorm(3, mode).state_dict())
    with pytest.raises(ValueError, match="fit it"):
        loaded(data)
    assert list(layer.state_dict()) == ["center", "scale"]


def test_fitting_again_forgets_and_updating_goes_on_until_finish() -> None:
    first, second = images(20, 3, seed=1), images(20, 3, seed=2)
    layer = InputNorm(3).double().fit([first])
    fresh = InputNorm(3).double().fit([second])
    assert torch.equal(layer.fit([second])(first), fresh(first))
    layer.update(first)
    assert torch.equal(layer(first), fresh(first))  # in use until then
    layer.update(second)
    assert torch.equal(copy.deepcopy(layer).fit([second])(first), fresh(first))
    layer.finish()
    both = InputNorm(3).double().fit([torch.cat([first, second])])
    assert error(layer(first), both(first)) <= 1e-12


def test_it_fits_to_a_data_loader_with_labels() -> None:
    data = images(20, 3)
    dataset = torch.utils.data.TensorDataset(data, torch.zeros(20))
    loader = torch.utils.data.DataLoader(dataset, batch_size=6, shuffle=True)
    expected = published("z_score", data, data)
    assert error(InputNorm(3).double().fit(loader)(data), expected) <= 1e-9


@pytest.mark.parametrize("mode", FITTED)
def test_bytes_are_normalized_as_floats(mode: Any) -> None:
    data = torch.randint(0, 256, (9, 3, 5, 5), dtype=torch.uint8)
    y = InputNorm(3, mode).fit([data])(data)
    assert error(y, published(mode, data, data).float()) <= 1e-5


@pytest.mark.parametrize("mode", [*FITTED, "unit_length"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, mode: Any) -> None:
    data = images(20, 3, 4, 4)
    x = data.to(dtype)
    layer = InputNorm(3, mode).fit([data])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x.float()).to(dtype))


@pytest.mark.parametrize("mode", [*FITTED, "unit_length"])
def test_memory_format_is_kept(mode: Any) -> None:
    data = images(4, 3, 5, 5)
    layer = InputNorm(3, mode).double().fit([data])
    assert layer(data).is_contiguous()
    y = layer(data.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(data), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [*FITTED, "unit_length"])
def test_gradients_reach_the_input(mode: Any) -> None:
    data = images(4, 3, 2)
    layer = InputNorm(3, mode).double().fit([data])
    x = data.clone().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("mode", FITTED)
def test_nothing_of_the_inputs_size_is_kept_for_backward(mode: Any) -> None:
    data = images(50, 3, 4, 4)
    layer, sizes = InputNorm(3, mode).double().fit([data]), []
    conv = mode in MIXING  # torch's convolution keeps its input, though no weight needs it
    x = data.clone().requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(size >= x.numel() for size in sizes) == conv


@pytest.mark.parametrize("mode", ["z_score", "zca", "unit_length"])
def test_it_compiles_and_exports_before_a_model(mode: Any, tmp_path: Path) -> None:
    data = images(8, 3, 6, 6).float()
    layer = InputNorm(3, mode).fit([data])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data), layer(data))
    model = nn.Sequential(layer, nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert ns.export(model, data[:2], tmp_path / "m.onnx").passed


def test_convert_leaves_it_alone_before_a_model() -> None:
    data = images(8, 3, 6, 6).float()
    layer = InputNorm(3).fit([data])
    model = nn.Sequential(layer, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    converted = ns.convert(model, "group_norm")
    assert isinstance(converted[2], nn.GroupNorm)
    assert torch.equal(converted[0](data), layer(data))
    folded = ns.fold(model, inputs=data)
    torch.testing.assert_close(folded(data), model(data), rtol=1e-4, atol=1e-5)


def test_it_is_created_by_name() -> None:
    layer = ns.create("input_norm", 3, mode="zca", eps=1e-3)
    assert (layer.mode, layer.eps, layer.num_features) == ("zca", 1e-3, 3)
    assert "fitted=False" in repr(layer)


@pytest.mark.parametrize(
    ("options", "words"), [({"mode": "pca"}, "z_score"), ({"eps": 0.0}, "positive")]
)
def test_impossible_options_are_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ns.NormswapError, match=words) as raised:
        ns.create("input_norm", 3, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer: layer(torch.zeros(2, 3)), "fit it"),
        (lambda layer: layer.fit([]), "at least one batch"),
        (lambda layer: layer.fit([torch.zeros(0, 3)]), "at least one batch"),
        (lambda layer: layer.finish(), "at least one batch"),
        (lambda layer: layer.fit([torch.zeros(2, 4)]), "expected"),
        (lambda layer: layer.fit([torch.zeros(3)]), "expected"),
        (lambda layer: layer.fit([torch.full((2, 3), torch.nan)]), "NaN"),
        (lambda layer: layer.fit([torch.ones(2, 3)])(torch.zeros(2, 4)), "expected"),
    ],
)
def test_misuse_is_told_in_one_line(call: Callable[[InputNorm], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        call(InputNorm(3))
    assert "\n" not in str(raised.value)
