"""The identity classifier: rows (class weights) spread over the processes, outside the engines.

Classes are the S source identities, then the C pseudo-identities of this epoch. Each of the W processes owns
an equal share of both, sees the features of all of them (B, D) and computes its columns of the logits; the
softmax is put together from sums over the processes. No process ever holds all rows or all logits, and the
rows' gradient needs no reduction.

Every epoch the pseudo-identities are new: their rows start at the centroids with an Adam that has seen
nothing. The source rows are the same classes as before, so they keep their weights *and* their Adam moments;
throwing those away would give each epoch a jump of one learning rate in every weight. (The published code
makes a new Adam for everything each epoch of stage two; `forget_moments` does that.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dmx.distributed import World, collect, gather_rows, scale_gradient

PARTS = ("source", "pseudo")
MOMENTS = ("exp_avg", "exp_avg_sq")
INITIAL_STD = 0.001


def share_of(total: int, world: World) -> slice:
    """The rows that this process owns of `total`."""
    return slice(total * world.rank // world.size, total * (world.rank + 1) // world.size)


def _counts(total: int, world: World) -> list[int]:
    return [total * (rank + 1) // world.size - total * rank // world.size for rank in range(world.size)]


class _ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy with label smoothing over logits whose columns lie on several processes."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, column: torch.Tensor, classes: int, smoothing: float, size: int
    ) -> torch.Tensor:
        owned = column >= 0
        rows = owned.nonzero().squeeze(1)
        highest = logits.new_full((len(logits),), -torch.inf)
        if logits.shape[1]:
            highest = logits.amax(1)
        if size > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        weights = torch.exp(logits - highest[:, None])
        sums = torch.stack([weights.sum(1), logits.sum(1), torch.zeros_like(highest)])
        sums[2, rows] = logits[rows, column[rows]]
        if size > 1:
            dist.all_reduce(sums)
        total, logit_sum, target = sums
        loss = highest + total.log() - (1 - smoothing) * target - smoothing / classes * logit_sum
        ctx.save_for_backward(weights, total, rows, column[rows])
        ctx.constants = classes, smoothing
        mean: torch.Tensor = loss.mean()
        return mean

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        weights, total, rows, columns = ctx.saved_tensors
        classes, smoothing = ctx.constants
        logits = weights / total[:, None] - smoothing / classes
        logits[rows, columns] -= 1 - smoothing
        return logits * (gradient / len(weights)), None, None, None, None


def sharded_cross_entropy(
    features: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    *,
    classes: int,
    smoothing: float,
    scale: float,
    size: int,
) -> torch.Tensor:
    """Cross-entropy of scale * features @ all rows, from this process's rows.

    Args:
        features: (B, D), the same on every process.
        weight: (C_r, D), this process's rows; may be empty.
        column: (B,) int64, the label's row among this process's rows, -1 where another one owns it.
        classes: rows over all processes.
        smoothing: share of the target spread evenly over all classes.
        scale: factor of the logits.
        size: number of processes, W.

    Returns:
        Scalar: the mean over B, the same on every process. Its gradient reaches `weight` in full and
        `features` only through this process's rows: the sum over the processes is the gradient.
    """
    logits = F.linear(features, weight) * scale
    return _ShardedCrossEntropy.apply(logits, column, classes, smoothing, size)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ClassifierSettings:
    """What the classifier is made of: `lr` is set anew every epoch."""

    width: int
    lr: float
    weight_decay: float
    smoothing: float
    scale: float


class Classifier:
    """Source and pseudo-identity rows of this process, their optimiser and their loss."""

    def __init__(self, world: World, settings: ClassifierSettings, source_rows: torch.Tensor) -> None:
        """Start with the source identities alone.

        Args:
            world: this process among the others.
            settings: width, optimiser and loss.
            source_rows: (S, D) float32, all of them on every process.
        """
        self.world = world
        self.settings = settings
        self.sizes = {"source": len(source_rows), "pseudo": 0}
        self.rows = {
            "source": self._own(source_rows),
            "pseudo": self._own(source_rows.new_zeros((0, settings.width))),
        }
        self._optimizer = self._make_optimizer()

    def _own(self, rows: torch.Tensor) -> torch.nn.Parameter:
        mine = rows[share_of(len(rows), self.world)]
        return torch.nn.Parameter(mine.to(self.world.device, copy=True))

    def _make_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(
            list(self.rows.values()), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )

    @property
    def classes(self) -> int:
        """Classes over all processes, S + C."""
        return sum(self.sizes.values())

    def set_pseudo_rows(self, centroids: torch.Tensor | None, *, forget_moments: bool = False) -> None:
        """Begin an epoch: replace the pseudo-identities.

        Args:
            centroids: (C, D) float32, all of them on every process; None trains on the source alone.
            forget_moments: also start the source rows' Adam anew.
        """
        if centroids is None:
            centroids = torch.zeros((0, self.settings.width))
        kept = {} if forget_moments else self._optimizer.state.get(self.rows["source"], {})
        self.sizes["pseudo"] = len(centroids)
        self.rows["pseudo"] = self._own(centroids.float())
        self._optimizer = self._make_optimizer()
        if kept:
            self._optimizer.state[self.rows["source"]] = kept

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the images of all processes.

        Args:
            features: (B, D) float32, this process's images.
            labels: (B,) int64 in [0, S + C).

        Returns:
            Scalar, the mean over W B images. Backward leaves the exact gradient in the rows; the features'
            gradient is W times it, because the engine averages over the W processes.
        """
        size = self.world.size
        everyone = scale_gradient(gather_rows(features), size)
        column = self._columns(gather_rows(labels))
        return sharded_cross_entropy(
            everyone,
            torch.cat([self.rows["source"], self.rows["pseudo"]]),
            column,
            classes=self.classes,
            smoothing=self.settings.smoothing,
            scale=self.settings.scale,
            size=size,
        )

    def _columns(self, labels: torch.Tensor) -> torch.Tensor:
        source, pseudo = (share_of(self.sizes[part], self.world) for part in PARTS)
        owned_source = source.stop - source.start
        shifted = labels - self.sizes["source"]
        column = torch.full_like(labels, -1)
        in_source = (labels >= source.start) & (labels < source.stop)
        in_pseudo = (shifted >= pseudo.start) & (shifted < pseudo.stop)
        column = torch.where(in_source, labels - source.start, column)
        return torch.where(in_pseudo, shifted - pseudo.start + owned_source, column)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all rows."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> None:
        """Update this process's rows and clear their gradient."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """All rows and moments (on the CPU of the first process), and Adam's steps of each part."""
        tensors: dict[str, torch.Tensor] = {}
        steps: dict[str, int] = {}
        for part in PARTS:
            rows, counts = self.rows[part], _counts(self.sizes[part], self.world)
            own = self._optimizer.state.get(rows, {})
            tensors[part] = collect(self.world, rows.detach().cpu(), counts)
            steps[part] = int(own["step"]) if own else 0
            if own:
                for moment in MOMENTS:
                    tensors[f"{part}.{moment}"] = collect(self.world, own[moment].cpu(), counts)
        return tensors, steps

    def load_state(self, tensors: dict[str, torch.Tensor], steps: dict[str, int]) -> None:
        """Go on from what `state` returned, at any number of processes."""
        for part in PARTS:
            self.sizes[part] = len(tensors[part])
            self.rows[part] = self._own(tensors[part])
        self._optimizer = self._make_optimizer()
        for part in PARTS:
            if steps[part]:
                mine = share_of(self.sizes[part], self.world)
                state: dict[str, Any] = {"step": torch.tensor(float(steps[part]))}
                for moment in MOMENTS:
                    state[moment] = tensors[f"{part}.{moment}"][mine].to(self.world.device, copy=True)
                self._optimizer.state[self.rows[part]] = state
