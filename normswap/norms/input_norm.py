"""Normalization of a model's inputs, fitted to data once and fixed from then on.

With mu, v, low, high the mean, variance, minimum and maximum of a channel over the data (samples
and positions), and U diag(l) U^T the covariance S of the channels:

- "centering":      x - mu
- "mean":           (x - mu) / (high - low), mean normalization
- "min_max":        (x - low) / (high - low), from 0 to 1
- "z_score":        (x - mu) / sqrt(v)
- "decorrelation":  U^T (x - mu), the principal components; their variances are l
- "sphering":       diag(l)^(-1/2) U^T (x - mu), PCA whitening
- "zca":            S^(-1/2) (x - mu), the whitening that stays closest to x
- "unit_length":    x / ||x||, the Euclidean norm of each sample; there is nothing to fit

LeCun et al. 1998, Efficient BackProp, section 4.3, for why: inputs of mean 0, of like variance and
uncorrelated. Bell & Sejnowski 1997, The "independent components" of natural scenes are edge
filters, for ZCA; Kessy et al. 2018 (arXiv 1512.00809) for how the whitenings differ.

    layer = create("input_norm", 3).fit(images)
    model = nn.Sequential(layer, model)

The statistics per channel are of data that come in batches, in one pass. Chan, Golub & LeVeque 1979
(Updating formulae and a pairwise algorithm for computing sample variances): the sums of squares
about the means of two sets, A and B, give that of their union,

    S = S_A + S_B + (m_B - m_A)^2 n_A n_B / (n_A + n_B),

and the same with an outer product for a covariance. Everything is in float64, and nothing cancels
where means are large, so that it does not matter how the data are cut into batches.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.norms.batch.whitening import mix_channels
from normswap.norms.channels import check_channels
from normswap.norms.kernels import per_channel, statistics_dtype, without_autocast
from normswap.norms.registry import register


class InputStatistics:
    """Of the values seen so far, per channel.

    Args:
        covariance: take the covariance of the channels, not only the variance of each.

    Attributes:
        count: how many values a channel has.
        mean, low, high: (C,), in float64.
    """

    def __init__(self, num_features: int, *, covariance: bool) -> None:
        nothing = torch.full((num_features,), torch.inf, dtype=torch.float64)
        self.count = 0
        self.mean = torch.zeros_like(nothing)
        self.low, self.high = nothing, -nothing
        self._squares = torch.zeros((num_features,) * (1 + covariance), dtype=torch.float64)

    @property
    def spread(self) -> Tensor:
        """The (biased) covariance, (C, C), or variance, (C,)."""
        return self._squares / self.count

    def add(self, x: Tensor) -> None:
        """Take in one batch, (N, C, ...)."""
        rows = x.to("cpu", torch.float64).transpose(0, 1).flatten(1)
        count = rows.shape[1]
        if not count:
            return
        mean = rows.mean(1)
        centered, step = rows - mean[:, None], mean - self.mean
        weight = count / (self.count + count)
        if self._squares.dim() == 2:
            squares, steps = centered @ centered.T, torch.outer(step, step)
        else:
            squares, steps = centered.square().sum(1), step.square()
        self._squares = self._squares + squares + steps * (self.count * weight)
        self.mean = self.mean + step * weight
        self.low = torch.minimum(self.low, rows.amin(1))
        self.high = torch.maximum(self.high, rows.amax(1))
        self.count += count


InputMode = Literal[
    "centering",
    "mean",
    "min_max",
    "z_score",
    "decorrelation",
    "sphering",
    "zca",
    "unit_length",
]
EPS = 1e-12  # of a variance: float32 resolves components down to about there
_MATRICES = ("decorrelation", "sphering", "zca")


class InputNorm(nn.Module):
    """Normalization of inputs (N, C, ...) of any rank >= 2 by statistics of the data.

    LeCun et al. 1998, section 4.3; Kessy et al. 2018 (arXiv 1512.00809). `fit` it to data, or
    `update` it with batch after batch and `finish`. It is the same in training and eval mode, and
    its state dict holds what was fitted. Integers, as of images, come out as float32.

    Args:
        num_features: C.
        mode: as the module's docstring lists them.
        eps: what varies by no more than this share is constant but for rounding, and not divided
            by: a channel with a deviation or range of that share of its magnitude, a component with
            that share of the largest variance. A share, so that no unit of the data is too small.

    Attributes:
        center: (C,), what is subtracted; NaN before fitting.
        scale: (C,), or (C, C) in a mode that mixes channels; what is multiplied by then.

    Raises:
        NormswapError: an unknown mode, or an eps that is not positive.
        ValueError: used before it was fitted, or on another number of channels.
    """

    norm_kind = "input"
    center: Tensor
    scale: Tensor

    def __init__(self, num_features: int, mode: InputMode = "z_score", eps: float = EPS) -> None:
        super().__init__()
        if mode not in get_args(InputMode):
            raise NormswapError(
                f"unknown mode {mode!r}; choose one of {', '.join(get_args(InputMode))}"
            )
        if not eps > 0:
            raise NormswapError(f"eps is {eps}; a positive one keeps constant channels finite")
        self.num_features = num_features
        self.mode = mode
        self.eps = eps
        self.fitted = mode == "unit_length"
        self._seen: InputStatistics | None = None
        if not self.fitted:
            shape = (num_features,) * (1 + (mode in _MATRICES))
            self.register_buffer("center", torch.full((num_features,), torch.nan))
            self.register_buffer("scale", torch.full(shape, torch.nan))

    def fit(self, data: Iterable[Tensor | Sequence[Tensor]]) -> "InputNorm":
        """Fit to batches (N, C, ...), anew if it was fitted before.

        Args:
            data: tensors, or tuples or lists whose first item is one, as a DataLoader yields; or
                one tensor, of all the data.

        Raises:
            ValueError: no values, values that are not finite, or another number of channels.
        """
        self._seen = None
        try:
            for batch in [data] if isinstance(data, Tensor) else data:
                self.update(batch if isinstance(batch, Tensor) else batch[0])
            return self.finish()
        finally:
            self._seen = None

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Take the statistics of one more batch, (N, C, ...), for `finish`."""
        check_channels(batch, self.num_features)
        if not batch.isfinite().all():
            raise ValueError("a batch holds NaN or infinity; remove such samples, then fit")
        if self._seen is None:
            self._seen = InputStatistics(self.num_features, covariance=self.mode in _MATRICES)
        self._seen.add(batch)

    @torch.no_grad()
    def finish(self) -> "InputNorm":
        """Fix what the batches since the last call give."""
        if self._seen is None or not self._seen.count:
            raise ValueError("there are no values to fit to; give at least one batch of samples")
        if self.mode != "unit_length":
            center, scale = _affine(self.mode, self._seen, self.eps)
            self.center.copy_(center)
            self.scale.copy_(scale)
        self.fitted, self._seen = True, None
        return self

    def forward(self, input: Tensor) -> Tensor:
        check_channels(input, self.num_features)
        if not self.fitted:
            raise ValueError("this InputNorm knows no data; fit it first, or load its state")
        wide = statistics_dtype(input)
        with without_autocast(input.device.type):
            y = self._normalize(input.to(wide))
        return y.to(input.dtype if input.is_floating_point() else wide)

    def _normalize(self, x: Tensor) -> Tensor:
        if self.mode == "unit_length":
            axes = tuple(range(1, x.dim()))
            length: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
            return x / length.where(length > 0, 1.0)
        # First the mean: where it is large, little of x would be left after the product.
        x, scale = x - per_channel(self.center.to(x.dtype), x), self.scale.to(x.dtype)
        if scale.dim() == 2:
            return mix_channels(x, scale[None])
        return x * per_channel(scale, x)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.mode != "unit_length":
            self.fitted = bool(self.center.isfinite().all())

    def extra_repr(self) -> str:
        return f"{self.num_features}, mode={self.mode}, eps={self.eps}, fitted={self.fitted}"


def _affine(mode: InputMode, seen: InputStatistics, eps: float) -> tuple[Tensor, Tensor]:
    """`InputNorm.center` and `InputNorm.scale`, in float64."""
    if mode in _MATRICES:
        return seen.mean, _rotation(mode, seen.spread, eps)
    center = seen.low if mode == "min_max" else seen.mean
    if mode == "centering":
        return center, torch.ones_like(center)
    width = seen.spread.sqrt() if mode == "z_score" else seen.high - seen.low
    magnitude = torch.maximum(seen.high.abs(), seen.low.abs())
    return center, 1 / width.where(width > eps * magnitude, 1.0)


def _rotation(mode: InputMode, covariance: Tensor, eps: float) -> Tensor:
    """The matrix of a mode that mixes channels, (C, C)."""
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(covariance)
    inverse = values.where(values > eps * values[-1], 1.0).rsqrt()
    if mode == "zca":
        return (vectors * inverse) @ vectors.T
    # The components by falling variance, each with its largest entry positive: any other order or
    # signs are a rotation as good, and one has to be chosen.
    vectors, inverse = vectors.flip(1), inverse.flip(0)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    rotation = (vectors * largest.sign()).T
    return rotation if mode == "decorrelation" else inverse[:, None] * rotation


register(
    "input_norm",
    InputNorm,
    summary="a layer before the model, fitted to data: z-scores, ranges, unit length or whitening",
    source="LeCun et al. 1998, Efficient BackProp; Kessy et al. 2018, arXiv 1512.00809",
    kind="input",
    formula="A (x - b), A and b of the data: (x - E[x]) / sqrt(Var[x]), Cov[x]^(-1/2) (x - E[x])",
    statistics="fixed",
    cost="1 pass",
)
