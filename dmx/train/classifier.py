"""The identity classifier: rows (class weights) spread over the processes, outside the engines.

Classes are the S source identities, then the C pseudo-identities of this epoch. Each of the W processes owns
an equal share of both, sees the features of all of them (B, D) and computes its own classes' logits, a block
at a time; the softmax is put together from sums over the processes. No process ever holds all rows, all
logits of its rows or all of its rows' gradient, and that gradient needs no reduction.

The rows' gradient is made when they are updated: `step` goes through the blocks once, makes a block's
gradient from all micro-batches since the last step, and updates the block. So accumulation needs no room for
it, and steps of the discriminator, which leave the classifier alone, need no care.

Every epoch the pseudo-identities are new: their rows start at the centroids with an Adam that has seen
nothing. The source rows are the same classes as before, so they keep their weights *and* their Adam moments;
throwing those away would give each epoch a jump of one learning rate in every weight. (The published code
makes a new Adam for everything each epoch of stage two; `forget_moments` does that.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmx.distributed import World, collect, gather_rows, scale_gradient
from dmx.train.rows import MOMENTS, RowPrecision, Rows
from dmx.train.softmax import BLOCK_BYTES, Pass, Softmax, blocks, rows_gradient, sharded_cross_entropy

PARTS = ("source", "pseudo")
INITIAL_STD = 0.001


def share_of(total: int, world: World) -> slice:
    """The rows that this process owns of `total`."""
    return slice(total * world.rank // world.size, total * (world.rank + 1) // world.size)


def _counts(total: int, world: World) -> list[int]:
    return [total * (rank + 1) // world.size - total * rank // world.size for rank in range(world.size)]


@dataclass(frozen=True)
class ClassifierSettings:
    """What the classifier is made of: `lr` is set anew every epoch; `block_bytes` None suits the device."""

    width: int
    lr: float
    weight_decay: float
    smoothing: float
    scale: float
    precision: RowPrecision = "fp32"
    block_bytes: int | None = None


class Classifier:
    """Source and pseudo-identity rows of this process, their optimiser and their loss."""

    def __init__(self, world: World, settings: ClassifierSettings, source_rows: Tensor) -> None:
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
        self._block_bytes = settings.block_bytes or BLOCK_BYTES[world.device.type]
        self._lr = settings.lr
        self._passes: list[Pass] = []

    def _own(self, rows: Tensor) -> Rows:
        return Rows(rows[share_of(len(rows), self.world)], self.settings.precision, self.world.device)

    @property
    def classes(self) -> int:
        """Classes over all processes, S + C."""
        return sum(self.sizes.values())

    def set_pseudo_rows(
        self, centroids: Tensor | None, identities: int = 0, *, forget_moments: bool = False
    ) -> None:
        """Begin an epoch: replace the pseudo-identities.

        Args:
            centroids: this process's share (`share_of`) of (C, D) float32; None trains on the source alone.
            identities: C.
            forget_moments: also start the source rows' Adam anew.
        """
        if centroids is None:
            centroids = torch.zeros((0, self.settings.width))
        self.sizes["pseudo"] = identities
        self.rows["pseudo"] = Rows(centroids.float(), self.settings.precision, self.world.device)
        self._passes.clear()
        if forget_moments:
            self.rows["source"].forget_moments()

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy over the images of all processes.

        Args:
            features: (B, D) float32, this process's images.
            labels: (B,) int64 in [0, S + C).

        Returns:
            Scalar, the mean over W B images. Backward leaves what `step` makes the rows' gradient from; the
            features' gradient is W times the exact one, because the engine averages over the W processes.
        """
        settings, size = self.settings, self.world.size
        softmax = Softmax(self.classes, settings.smoothing, settings.scale, size, self._block_bytes)
        everyone = scale_gradient(gather_rows(features), size)
        column = self._columns(gather_rows(labels))
        parts = [self.rows[part].values for part in PARTS]
        return sharded_cross_entropy(everyone, parts, column, softmax, self._passes)

    def _columns(self, labels: Tensor) -> Tensor:
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
        self._lr = lr

    def gradients(self) -> Iterator[tuple[Rows, slice, Tensor]]:
        """The rows' gradient, summed over the micro-batches since the last step, a block at a time.

        Yields:
            Rows of a part, the block's place among them, and its (n, D) float32 gradient.
        """
        if not self._passes:
            return
        images, width = self._passes[0].scaled.shape
        first = 0
        for part in PARTS:
            rows = self.rows[part]
            for block in blocks(len(rows), images, width, self._block_bytes):
                yield rows, block, rows_gradient(self._passes, rows.values[block], first + block.start)
            first += len(rows)

    def step(self) -> None:
        """Update this process's rows, if there was a backward pass, and forget its gradient."""
        for rows, block, gradient in self.gradients():
            rows.update(block, gradient, self._lr, self.settings.weight_decay)
        if self._passes:
            for rows in self.rows.values():
                rows.count_step()
        self._passes.clear()

    def leave_out(self) -> None:
        """Forget the gradient without an update."""
        self._passes.clear()

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All rows and moments (on the CPU of the first process), and Adam's steps of each part."""
        tensors: dict[str, Tensor] = {}
        for part, rows in self.rows.items():
            counts = _counts(self.sizes[part], self.world)
            for name, own in rows.state().items():
                tensors[part if name == "rows" else f"{part}.{name}"] = collect(self.world, own, counts)
        return tensors, {part: rows.steps for part, rows in self.rows.items()}

    def load_state(self, tensors: dict[str, Tensor], steps: dict[str, int]) -> None:
        """Go on from what `state` returned, at any number of processes and in either precision."""
        self._passes.clear()
        for part in PARTS:
            self.sizes[part] = len(tensors[part])
            self.rows[part] = self._own(tensors[part])
            if steps[part]:
                mine = share_of(self.sizes[part], self.world)
                first, second = (tensors[f"{part}.{moment}"][mine] for moment in MOMENTS)
                self.rows[part].load_moments((first, second), steps[part])
