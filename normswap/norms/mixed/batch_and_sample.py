"""What methods have in common that mix statistics of the batch with those of the sample.

Such a method is a mix of `normswap.norms.moments`, a function of the moments of each sample and
channel, of those of the batch (in eval mode the running ones) and of parameters. Some thirty
operations on small tensors are most of what a training step costs where the input is small, so
that the step is one `Function` here, with the gradient of the mix written out by the method.
Compiled, in eval mode, or differentiated twice, the mix goes through the moments core as others do.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.norms import kernels
from normswap.norms.batch.plain import BatchNorm, values_per_channel
from normswap.norms.channels import check_channels, gain_and_offset
from normswap.norms.moments import normalize, pooled
from normswap.norms.recompute import gradients


class BatchAndSampleNorm(BatchNorm):
    """A BatchNorm that uses statistics of the sample as well, in eval mode too.

    A method gives its mix as static methods. In each, `parameters` are the method's `shares`, gamma
    and beta; mean, var, scale and shift (about the mean) are (N, C), and center and spread, the
    moments of the batch, (C,).

    Attributes:
        written: (eps, mean, var, center, spread, *parameters) -> (scale, shift).
        forward_step: (eps, mean, var, *parameters) -> (scale, shift, center, spread, *rest): the
            same with the batch's own moments, and what else the gradient needs.
        backward_step: (grad_scale, grad_shift, mean, var, *parameters, scale, *rest) -> the
            gradients of mean, var and the parameters. The mean's is that of the whole output,
            scale * (x - mean) + shift: besides what flows through scale and shift it has the term
            -scale * grad_shift.
    """

    written: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    forward_step: ClassVar[Callable[..., tuple[Tensor, ...]]]
    backward_step: ClassVar[Callable[..., tuple[Tensor, ...]]]

    def shares(self) -> tuple[Tensor, ...]:
        """The parameters that weigh the statistics."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            return super().forward(input)
        if not self.training and self.running_mean is not None:
            check_channels(input, self.num_features)
            return normalize(input, self._mix_running)
        values = values_per_channel(input, self.num_features)
        if kernels.recording():
            return normalize(input, lambda mean, var: self._mix_batch(mean, var, values))
        output, center, spread = _Step.apply(  # type: ignore[no-untyped-call]
            type(self), self.eps, input, *self._parameters_for(input)
        )
        self.update(center, spread, values)
        return output  # type: ignore[no-any-return]

    def _mix_batch(self, mean: Tensor, var: Tensor, values: int) -> tuple[Tensor, Tensor]:
        center, spread = pooled(mean, var, 0)
        self.update(center, spread, values)
        return self.written(self.eps, mean, var, center, spread, *self._parameters_for(mean))

    def _mix_running(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        center, spread = self.running_mean.to(mean.dtype), self.running_var.to(mean.dtype)
        return self.written(self.eps, mean, var, center, spread, *self._parameters_for(mean))

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, ...]:
        return *self.shares(), *gain_and_offset(self, x)


class _Step(Function):
    """x, parameters -> output, center, spread: a training step of a `BatchAndSampleNorm`."""

    @staticmethod
    def forward(
        ctx: Any, method: type[BatchAndSampleNorm], eps: float, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = kernels.moments(x)
        scale, shift, center, spread, *rest = method.forward_step(eps, mean, var, *parameters)
        ctx.method, ctx.eps, ctx.count = method, eps, len(parameters)
        ctx.save_for_backward(x, *parameters, mean, var, scale, *rest)
        ctx.mark_non_differentiable(center, spread)
        return kernels.affine(x, mean, scale, shift), center, spread

    @staticmethod
    def backward(
        ctx: Any, g: Tensor, _center: Tensor, _spread: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        parameters, (mean, var, scale, *rest) = saved[: ctx.count], saved[ctx.count :]
        if torch.is_grad_enabled():

            def again(x: Tensor, *parameters: Tensor) -> tuple[Tensor]:
                def mix(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
                    batch = pooled(mean, var, 0)
                    return ctx.method.written(ctx.eps, mean, var, *batch, *parameters)  # type: ignore[no-any-return]

                return (normalize(x, mix),)

            return None, None, *gradients(again, [x, *parameters], [g], ctx.needs_input_grad[2:])
        dot, total = kernels.reduce(g, x, mean)
        g_mean, g_var, *g_parameters = ctx.method.backward_step(
            dot, total, mean, var, *parameters, scale, *rest
        )
        if not ctx.needs_input_grad[2]:
            return None, None, None, *g_parameters
        count = x.shape[2:].numel()
        g_x = kernels.blend(g, scale, x, mean, g_var.mul_(2 / count), g_mean.mul_(1 / count))
        return None, None, g_x, *g_parameters
