"""Batch normalisation over all workers, on any device and backend.

`torch.nn.SyncBatchNorm` refuses the CPU. This one works wherever `torch.distributed` can all-gather and
all-reduce, and equals `nn.BatchNorm*` on the concatenated batch, also when workers hold different counts.

Legend: x input (N, C, ...), n values a channel on this worker, M2 sum of squared deviations from the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)


class SynchronisedBatchNorm(_BatchNorm):
    """Batch normalisation whose statistics are those of all workers' samples.

    In evaluation mode, and with one worker, it is plain batch normalisation. Every worker must call it the
    same number of times. Parameter gradients are this worker's share, to be averaged over workers as
    data-parallel training does with every other gradient.

    Args:
        as for `nn.BatchNorm2d`; inputs may have any number of dimensions from 2.
        group: the workers; all when None.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.group = group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"batch norm wants an input of 2 or more dimensions (N, C, ...), got {x.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, ...)."""
        self._check_input_dim(x)
        batch_statistics = self.training or self.running_mean is None
        if not batch_statistics or not _is_distributed(self.group):
            return self._after(super().forward(x))
        y, mean, M2, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.group)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._track(mean, M2, float(count))
        return self._after(y)

    @torch.no_grad()
    def _track(self, mean: Tensor, M2: Tensor, count: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_((M2 / (count - 1)).to(self.running_var.dtype), rate)

    def _after(self, y: Tensor) -> Tensor:
        """Timm fuses dropout and activation into some of its batch norms: a converted module keeps them."""
        for name in ("drop", "act"):
            if name in self._modules:
                y = self._modules[name](y)  # type: ignore[misc]
        return y


def synchronise_batchnorm(module: Module, group: dist.ProcessGroup | None = None) -> Module:
    """Make every batch norm in `module` normalise over all workers, in place.

    Parameters, buffers and state-dict keys stay the same objects and names, so it may come before or after
    loading weights; do it before an optimiser or engine hooks into the modules' forward.

    Args:
        module: any module.
        group: the workers; all when None.

    Returns:
        `module`, or its replacement when it is itself a batch norm.
    """
    for name, child in module.named_children():
        setattr(module, name, synchronise_batchnorm(child, group))
    if isinstance(module, _BatchNorm) and not isinstance(module, SynchronisedBatchNorm):
        return _converted(module, group)  # type: ignore[return-value]
    return module


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, batch norms in training mode use the batch and leave their running statistics alone."""
    tracking = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _converted(norm: _BatchNorm, group: dist.ProcessGroup | None) -> SynchronisedBatchNorm:
    new = SynchronisedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False, group=group
    )
    new.affine, new.track_running_stats, new.training = norm.affine, norm.track_running_stats, norm.training
    new._parameters.update(norm._parameters)
    new._buffers.update(norm._buffers)
    new._modules.update(norm._modules)
    return new


def _is_distributed(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _per_channel(values: Tensor, ndim: int) -> Tensor:
    return values.view(1, -1, *([1] * (ndim - 2)))


def _global_moments(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), M2 (C,) and count over all workers, by Chan's combination of the workers' moments.

    One collective. Deviations from each worker's own mean keep the precision that sums of squares lose.
    """
    axes = [axis for axis in range(x.ndim) if axis != 1]
    n = x.numel() // max(x.shape[1], 1)
    mean = x.mean(dim=axes) if n else x.new_zeros(x.shape[1])
    M2 = (x - _per_channel(mean, x.ndim)).square().sum(dim=axes)
    local = torch.cat((mean, M2, mean.new_full((1,), n)))
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    moments = torch.stack(gathered).double()
    means, M2s, counts = moments[:, : len(mean)], moments[:, len(mean) : -1], moments[:, -1:]
    count = counts.sum()
    if count <= 1:
        raise ValueError(
            f"batch norm in training wants more than one value a channel, got {int(count)} in all"
        )
    total_mean = (means * counts).sum(dim=0) / count
    total_M2 = (M2s + counts * (means - total_mean).square()).sum(dim=0)
    return total_mean.to(x.dtype), total_M2.to(x.dtype), count


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(M2 / count + eps) * weight + bias, with moments over all workers.

    Backward, with xhat the normalised input, g = dL/dy and sums over all workers' samples:
    dL/dx = weight / std * (g - sum(g) / count - xhat * sum(g xhat) / count).
    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _statistics_dtype(x)
        mean, M2, count = _global_moments(wide, group)
        inverse_std = torch.rsqrt(M2 / count + eps)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.group = group
        ctx.has_bias = bias is not None
        y = (wide - _per_channel(mean, x.ndim)) * _per_channel(inverse_std, x.ndim)
        if weight is not None:
            y = y * _per_channel(weight.to(y.dtype), x.ndim)
        if bias is not None:
            y = y + _per_channel(bias.to(y.dtype), x.ndim)
        ctx.mark_non_differentiable(mean, M2, count)
        return y.to(x.dtype), mean, M2, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        ndim = x.ndim
        axes = [axis for axis in range(ndim) if axis != 1]
        g = _statistics_dtype(grad)
        normalised = (_statistics_dtype(x) - _per_channel(mean, ndim)) * _per_channel(inverse_std, ndim)
        own = torch.cat((g.sum(dim=axes), (g * normalised).sum(dim=axes)))
        total = own.clone()
        dist.all_reduce(total, group=ctx.group)
        channels = x.shape[1]
        scale = inverse_std if weight is None else inverse_std * weight.to(inverse_std.dtype)
        total = total / count.to(total.dtype)
        grad_x = g - _per_channel(total[:channels], ndim) - normalised * _per_channel(total[channels:], ndim)
        grad_x = (grad_x * _per_channel(scale, ndim)).to(x.dtype)
        grad_weight = None if weight is None else own[channels:].to(weight.dtype)
        grad_bias = own[:channels].to(x.dtype if weight is None else weight.dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _statistics_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
