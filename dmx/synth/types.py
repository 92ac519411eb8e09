"""Array types and the random streams that everything in this package is drawn from."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

Purpose = Literal["shape", "outfit", "cloth", "gait", "camera", "plate", "view"]
_PURPOSE_NUMBER: dict[Purpose, int] = {
    "shape": 1,
    "outfit": 2,
    "cloth": 3,
    "gait": 4,
    "camera": 5,
    "plate": 6,
    "view": 7,
}

MAX_SEED = 2**32 - 1


def stream(purpose: Purpose, *key: int) -> np.random.Generator:
    """The random numbers of one purpose and one key: the same wherever and whenever they are drawn.

    Args:
        purpose: what the numbers are for; streams of different purposes are independent.
        key: numbers in [0, 2**32); every purpose is always used with the same number of them.
    """
    return np.random.default_rng([_PURPOSE_NUMBER[purpose], *key])
