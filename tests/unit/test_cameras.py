"""What cameras add is taken away, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmx import cameras as cameras_module
from dmx.cameras import few_of_own_camera, without_cameras
from dmx.cluster import pseudo_labels
from dmx.cluster.sharded import Group
from dmx.kernels.knn import Neighbours
from dmx.kernels.similarity import squared_lengths


def centred(features: torch.Tensor, cameras: list[int]) -> torch.Tensor:
    numbers = np.array(cameras, np.int32)
    return without_cameras(Group.of(len(features)), features, squared_lengths(features), numbers)


def test_the_mean_of_every_camera_is_gone() -> None:
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) + 2
    cameras = np.random.default_rng(0).integers(-1, 4, 300)
    found = centred(features, cameras.tolist())
    unit = F.normalize(features.double(), dim=1)
    for camera in range(-1, 4):
        of_it = torch.from_numpy(cameras == camera)
        torch.testing.assert_close(
            found[of_it], (unit[of_it] - unit[of_it].mean(0)).float(), atol=1e-7, rtol=0
        )


def test_an_image_that_is_all_its_camera_has_stays() -> None:
    found = centred(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 1.0]]), [5, 0, 0])
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.5, -0.5], [-0.5, 0.5]]))


def test_people_are_found_across_cameras_that_shift_all_they_see() -> None:
    """Without it every person falls apart into one cluster a camera."""
    rng = np.random.default_rng(0)
    people, cameras, images, width = 20, 3, 8, 32
    who = np.repeat(np.arange(people), cameras * images)
    where = np.tile(np.repeat(np.arange(cameras), images), people)
    x = rng.standard_normal((people, width))[who] + 1.5 * rng.standard_normal((cameras, width))[where]
    features = torch.from_numpy((x + 0.3 * rng.standard_normal(x.shape)).astype(np.float32))

    def apart(rows: torch.Tensor) -> float:
        """Share of people whose images are in more than one cluster, or in none."""
        labels = pseudo_labels(rows, k1=cameras * images).labels
        return float(np.mean([len(np.unique(labels[who == one])) > 1 for one in range(people)]))

    assert apart(features) > 0.9
    assert apart(centred(features, where.tolist())) == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sums_do_not_depend_on_the_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would over several processes, in float64; nor on the blocks."""
    # Nearly all of an image is its camera's, so that what is left shows the last bits of the mean.
    features = 1 + 1e-5 * torch.randn(999, 8, generator=torch.Generator().manual_seed(1))
    cameras = np.random.default_rng(1).integers(0, 3, 999)
    shuffled = np.random.default_rng(seed).permutation(999)
    whole = centred(features, cameras.tolist())
    monkeypatch.setattr(cameras_module, "_ELEMENTS", 8 * 100)
    again = centred(features[torch.from_numpy(shuffled)], cameras[shuffled].tolist())
    assert torch.equal(again, whole[torch.from_numpy(shuffled)])


def lists_of(rng: np.random.Generator, images: int, columns: int) -> Neighbours:
    """Every image first in its own list, then others by falling similarity."""
    x = F.normalize(torch.from_numpy(rng.standard_normal((images, 6))), dim=1)
    s = (x @ x.T).fill_diagonal_(2)
    similarities, indices = s.sort(dim=1, descending=True)
    return Neighbours(indices[:, :columns].int(), similarities[:, :columns].contiguous())


def chosen_by_hand(row: list[int], cameras: list[int], columns: int, most: list[int]) -> list[int]:
    """One list, an image at a time: the nearest that is allowed, or the nearest that is left."""
    camera, found = cameras[row[0]], [row[0]]
    while len(found) < columns:
        left = [image for image in row if image not in found]
        own = sum(image == row[0] or (camera >= 0 and cameras[image] == camera) for image in found)
        fit = [i for i in left if not (camera >= 0 and cameras[i] == camera) or own < most[len(found)]]
        found.append((fit or left)[0])
    return found


@pytest.mark.parametrize(
    ("share", "most"),
    [
        (0.25, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]),
        (0.1, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (0.7, [1, 2, 3, 3, 4, 5, 5, 6, 7, 7]),  # 0.7 * 10 is 7, and not a little more
        (0.0, [1] * 10),
        (1.0, list(range(1, 11))),
    ],
)
def test_lists_hold_no_more_of_their_own_camera_than_allowed(
    share: float, most: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    cameras = rng.integers(-1, 3, 60)
    nearest = lists_of(rng, 60, 24)
    first, count = 20, 30
    some = Neighbours(nearest.indices[first:][:count], nearest.similarities[first:][:count])
    monkeypatch.setattr(cameras_module, "_ENTRIES", 24 * 7)
    found = few_of_own_camera(some, cameras[first:][:count], cameras, 10, share)
    wanted = [chosen_by_hand(row, cameras.tolist(), 10, most) for row in some.indices.tolist()]
    assert found.indices.tolist() == wanted
    known = nearest.similarities.new_zeros(60, 60).scatter_(1, nearest.indices.long(), nearest.similarities)
    rows = torch.arange(first, first + count)[:, None]
    torch.testing.assert_close(found.similarities, known[rows, found.indices.long()])
    assert found.indices.dtype == nearest.indices.dtype


def test_a_share_of_one_leaves_the_nearest() -> None:
    nearest = lists_of(np.random.default_rng(0), 40, 20)
    found = few_of_own_camera(nearest, np.zeros(40, np.int32), np.zeros(40, np.int32), 10, 1.0)
    torch.testing.assert_close(found.indices, nearest.indices[:, :10].contiguous())


def test_short_lists_and_single_cameras_are_filled_with_the_nearest() -> None:
    nearest = lists_of(np.random.default_rng(0), 12, 6)
    found = few_of_own_camera(nearest, np.zeros(12, np.int32), np.zeros(12, np.int32), 10, 0.25)
    torch.testing.assert_close(found.indices, nearest.indices)
