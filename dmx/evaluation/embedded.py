"""What is compared: embeddings with the identities and cameras they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmx.errors import DmxError

UNKNOWN = -1
CHECKED_ROWS = 4096
# ||x - y||^2 is at most four times the larger of both squared norms.
LARGEST_SQUARED_NORM = float(np.finfo(np.float32).max) / 4


@dataclass(frozen=True)
class Embedded:
    """Embeddings of one split.

    Args:
        features: (N, D) float32, finite and short enough for squared distances to be so; other floating
            types are converted.
        identities: (N,) int64; -1 is junk that counts neither for nor against anything.
        cameras: (N,) int32; -1 is unknown, and no two unknown cameras are the same.

    Raises:
        DmxError: wrong shapes, or features that are not finite or too long (the first such row is named).
    """

    features: NDArray[np.float32]
    identities: NDArray[np.int64]
    cameras: NDArray[np.int32]

    def __post_init__(self) -> None:
        features = np.ascontiguousarray(self.features, dtype=np.float32)
        # Copies: compiled code takes a read-only column, as memory-mapped data gives, for another type.
        identities = np.array(self.identities, dtype=np.int64)
        cameras = np.array(self.cameras, dtype=np.int32)
        if features.ndim != 2:
            raise DmxError(f"features: wanted shape (N, D), found {features.shape}")
        for name, column in (("identities", identities), ("cameras", cameras)):
            if column.shape != (len(features),):
                raise DmxError(
                    f"{name}: wanted one for each of the {len(features)} features, found shape {column.shape}"
                )
        _require_finite_distances(features)
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "identities", identities)
        object.__setattr__(self, "cameras", cameras)

    def __len__(self) -> int:
        return len(self.features)

    def known(self) -> Embedded:
        """Without the rows of identity -1."""
        keep = self.identities != UNKNOWN
        if keep.all():
            return self
        return Embedded(self.features[keep], self.identities[keep], self.cameras[keep])


def _require_finite_distances(features: NDArray[np.float32]) -> None:
    for start in range(0, len(features), CHECKED_ROWS):
        block = features[start : start + CHECKED_ROWS]
        with np.errstate(over="ignore", invalid="ignore"):
            usable = np.einsum("nd,nd->n", block, block) <= LARGEST_SQUARED_NORM
        if usable.all():
            continue
        row = int(np.argmin(usable))
        if not np.isfinite(block[row]).all():
            raise DmxError(f"features: wanted finite numbers, found NaN or infinity in row {start + row}")
        raise DmxError(
            f"features: wanted rows whose squared distances fit float32, found length "
            f"{np.linalg.norm(block[row].astype(np.float64)):.3g} in row {start + row}; make them unit rows"
        )
