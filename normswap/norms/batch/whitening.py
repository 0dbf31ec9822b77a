"""Decorrelated batch normalization: groups of channels are whitened, not only standardized.

Huang et al. 2018 (arXiv 1804.08450), DBN: with the mean mu and the covariance S of a group of
channels over the batch and all positions,

    y = gamma D (x - mu) + beta,    D = (S + eps I)^(-1/2),

the symmetric root, ZCA: of all the whitenings it turns the channels the least, and no eigenvector
changes places with another from one batch to the next. Huang et al. 2019 (arXiv 1904.03441),
IterNorm, take Newton's iteration towards D, few steps of which also leave small, noisy eigenvalues
alone. Both keep running averages of mu and D for inference, where it all is one 1x1 convolution.

This is not one scale per sample and channel, so the moments core does not apply: a covariance needs
every channel of a group at once. The centred batch is kept for backward in place of the input, in
float32 where that is of half precision, and matrices of the size of a group.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from normswap.core.errors import NormswapError
from normswap.norms.batch.frozen import scale_and_shift
from normswap.norms.batch.plain import track, values_per_channel
from normswap.norms.channels import AffineNorm, check_channels
from normswap.norms.kernels import statistics_dtype, without_autocast
from normswap.norms.registry import register

Solver = Literal["eigh", "newton"]
# What the papers settle on: DBN, and IterNorm.
GROUP_SIZE = {"eigh": 16, "newton": 64}


class DecorrelatedBatchNorm(AffineNorm):
    """Decorrelated batch normalization of (N, C, ...) of any rank >= 2.

    Huang et al. 2018 (arXiv 1804.08450), and 2019 (arXiv 1904.03441) with solver="newton".
    `running_projection`, the average of D, (C / d, d, d), is in the place of `running_var`.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as `torch.nn.BatchNorm2d`; eps is
            added to the diagonal of the covariance.
        group_size: d, how many channels are whitened together; the largest divisor of C that is not
            larger. By default 16 with "eigh" and 64 with "newton", as in the papers.
        solver: "eigh" for the exact root, "newton" for `iterations` steps towards it.
        iterations: of Newton's; 5 in the paper.

    Raises:
        NormswapError: an unknown solver, or a size or number of iterations < 1.
        ValueError: in training, a channel with a single value; another number of channels.
    """

    norm_kind = "decorrelated_batch"
    running_mean: Tensor | None
    running_projection: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group_size: int | None = None,
        solver: Solver = "eigh",
        iterations: int = 5,
    ) -> None:
        super().__init__(num_features)
        if solver not in GROUP_SIZE:
            raise NormswapError(f"unknown solver {solver!r}; choose eigh or newton")
        most = GROUP_SIZE[solver] if group_size is None else group_size
        if most < 1 or iterations < 1:
            raise NormswapError(
                f"group_size={most} and iterations={iterations} must both be at least 1"
            )
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.group_size = max(
            d for d in range(1, min(most, num_features) + 1) if num_features % d == 0
        )
        self.solver = solver
        self.iterations = iterations
        self.add_affine(affine)
        whole = torch.eye(self.group_size).repeat(num_features // self.group_size, 1, 1)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_projection", whole if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)

    def forward(self, input: Tensor) -> Tensor:
        check_channels(input, self.num_features)
        with without_autocast(input.device.type):
            if not self.training and self.running_projection is not None:
                wide = statistics_dtype(input)
                return mix_channels(input.to(wide), *self._inference(wide)).to(input.dtype)
            # As in BatchNorm, an empty batch passes through and teaches nothing.
            return self._with_batch(input) if input.numel() else input.clone()

    def _with_batch(self, x: Tensor) -> Tensor:
        values = values_per_channel(x, self.num_features)
        samples, channels, *positions = x.shape
        groups = (channels // self.group_size, self.group_size, -1)
        rows = x.to(statistics_dtype(x)).transpose(0, 1).reshape(groups)
        mean = rows.mean(-1, keepdim=True)
        centered = rows - mean
        projection = self._root(centered @ centered.mT / values)
        if self.training and self.track_running_stats:
            track(self, self.momentum, running_mean=mean, running_projection=projection)
        shift = torch.zeros_like(mean) if self.bias is None else self.bias.to(mean).view(groups)
        y = torch.baddbmm(shift, self._gained(projection), centered)
        # In the dtype and memory format of x.
        return torch.empty_like(x).copy_(y.view(channels, samples, *positions).transpose(0, 1))

    def _root(self, covariance: Tensor) -> Tensor:
        if self.solver == "eigh":
            return inverse_sqrt(covariance, self.eps)
        return newton_inverse_sqrt(covariance, self.eps, self.iterations)

    def _gained(self, projection: Tensor) -> Tensor:
        """gamma D of each group, (C / d, d, d)."""
        if self.weight is None:
            return projection
        return self.weight.to(projection).view(-1, self.group_size, 1) * projection

    def _inference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gamma D of each group, (C / d, d, d), and the shift, (C,), of eval mode."""
        assert self.running_mean is not None
        assert self.running_projection is not None
        blocks = self._gained(self.running_projection.to(dtype))
        mean = self.running_mean.to(dtype).view(-1, self.group_size, 1)
        shift = -(blocks @ mean).flatten()
        return blocks, shift if self.bias is None else shift + self.bias.to(dtype)

    def inference_matrix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What eval mode computes: y = matrix @ x + shift at each position.

        A convolution or Linear with weight W, (C, ...), and bias b before it can take it in:
        their W becomes matrix @ W, and their b becomes matrix @ b + shift.

        Returns:
            matrix, (C, C), block-diagonal, and shift, (C,).
        """
        blocks, shift = self._inference(dtype)
        return torch.block_diag(*blocks), shift  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        solver = self.solver + f", iterations={self.iterations}" * (self.solver == "newton")
        return (
            f"{super().extra_repr()}, track_running_stats={self.track_running_stats}, "
            f"group_size={self.group_size}, solver={solver}"
        )


def mix_channels(x: Tensor, blocks: Tensor, shift: Tensor | None = None) -> Tensor:
    """blocks @ x + shift at each position, group by group: a grouped 1x1 convolution.

    Args:
        x: (N, C, ...), of any rank >= 2.
        blocks: (C / d, d, d).
        shift: (C,).
    """
    samples, channels, *positions = x.shape
    # A reshape to four axes keeps channels that lie last where they are.
    flat = x if x.dim() == 4 else x.reshape(samples, channels, torch.Size(positions).numel(), 1)
    weight = blocks.reshape(channels, -1, 1, 1)
    y: Tensor = F.conv2d(flat, weight, shift, groups=blocks.shape[0])
    return y.reshape(x.shape)


# --- (S + eps I)^(-1/2) ---------------------------------------------------------------------------


def newton_inverse_sqrt(covariance: Tensor, eps: float, iterations: int) -> Tensor:
    """Newton's iteration towards (S + eps I)^(-1/2), arXiv 1904.03441, algorithm 1.

        P <- (3 P - P^3 S') / 2,   S' = (S + eps I) / t,   t its trace,   P / sqrt(t) in the end.

    Written so, rounding makes it diverge after a dozen steps. The same iteration in P and Q = S' P,
    of three products as well, is stable (Higham 2008, Functions of Matrices, chapter 6).

    Args:
        covariance: S, (..., d, d), symmetric and not negative.
    """
    one = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    covariance = covariance + eps * one
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    normed = covariance / trace
    root, other = one.expand_as(normed), normed
    for _ in range(iterations):
        step = 1.5 * one - 0.5 * root @ other
        root, other = step @ root, other @ step
    return root * trace.rsqrt()


def inverse_sqrt(covariance: Tensor, eps: float) -> Tensor:
    """(S + eps I)^(-1/2), differentiable any number of times, for eigenvalues that coincide too.

    The derivative of an eigendecomposition divides by differences of eigenvalues. That of a
    function of a matrix does not (Daleckii & Krein 1965): for this one, D = (S + eps I)^(-1/2),

        dD D + D dD = -D^2 dS D^2,

    an equation of Lyapunov's that in the eigenbasis is a division by sums of roots.

    Args:
        covariance: S, (..., d, d), symmetric and not negative but for rounding.
    """
    root: Tensor = _InverseSqrt.apply(covariance, eps)[0]  # type: ignore[no-untyped-call]
    return root


class _InverseSqrt(Function):
    """S, eps -> D, and the eigenvalues of D and the eigenvectors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(covariance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # NaN and infinity, of which there is no decomposition, give NaN as in any other method.
        finite = covariance.isfinite().flatten(-2).all(-1)[..., None]
        values, vectors = torch.linalg.eigh(covariance.where(finite[..., None], 0.0))
        # By rounding an eigenvalue may be below 0, by more than eps where others are large.
        values = (values.clamp(min=0) + eps).rsqrt().where(finite, torch.nan)
        return (vectors * values.unsqueeze(-2)) @ vectors.mT, values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        root, values, vectors = ctx.saved_tensors
        half = _Lyapunov.apply(root, grad, values, vectors)  # type: ignore[no-untyped-call]
        inverse = root @ root
        return -inverse @ half @ inverse, None


class _Lyapunov(Function):
    """A, Q -> the X with A X + X A = Q, where A is symmetric, of these eigenvalues and vectors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, q: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        return vectors @ ((vectors.mT @ q @ vectors) / sums) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a, _, values, vectors = inputs
        ctx.save_for_backward(a, output, values, vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, x, values, vectors = ctx.saved_tensors
        grad_q = _Lyapunov.apply(a, grad, values, vectors)  # type: ignore[no-untyped-call]
        return -(grad_q @ x.mT + x.mT @ grad_q), grad_q, None, None


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Let D divide each channel by what the BatchNorm `old` divides it by."""
    scale, _ = scale_and_shift(old, torch.float64)
    if isinstance(old.weight, Tensor):
        # Where gamma is 0 the output is beta whatever it multiplies.
        scale = torch.where(old.weight == 0, 1.0, scale / old.weight)
    assert isinstance(new, DecorrelatedBatchNorm)
    assert new.running_projection is not None
    new.running_projection.copy_(torch.diag_embed(scale.view(-1, new.group_size)))


register(
    "decorrelated_batch_norm",
    DecorrelatedBatchNorm,
    keeps="exact",
    summary="groups of channels whitened over the batch; a 1x1 convolution in eval mode",
    source="Huang et al. 2018, arXiv 1804.08450; Huang et al. 2019, arXiv 1904.03441",
    formula="gamma (Cov_B[x] + eps I)^(-1/2) (x - E_B[x]) + beta, in groups of channels",
    statistics="batch",
    cost="3 passes, and 2 products with matrices of the size of a group",
    needs_running=True,
    adopt=_adopt,
    fixed=("track_running_stats",),
)
