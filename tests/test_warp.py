"""A real image deformed with its mask: the pair stays a pair, and the intensities of each class
move as one.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import Geometry, InputError, LabelVolume
from runtime.core.deformation import DeformationParams, deform
from runtime.core.tissue_classes import TISSUES, tissue_map
from runtime.core.volume import Volume
from runtime.core.warp import IntensityJitter, Warp

STILL = DeformationParams(deform=0, rotate=0, scale=0)
GRID = Geometry.from_parts((5.0, -7.0, 11.0), (2.0, 2.0, 3.0), np.eye(3).ravel())


def pair(shape: tuple[int, int, int] = (20, 48, 48)) -> tuple[Volume, LabelVolume]:
    """A body of fat with muscle and a bone, a contrast-filled ball (2) in a shell (1), air
    around; HU with noise.
    """
    d, h, w = np.ogrid[: shape[0], : shape[1], : shape[2]]
    across = np.hypot(2 * (h - 24.0), 2 * (w - 24.0)) + 0.0 * d
    radius = np.sqrt((3 * (d - 10.0)) ** 2 + (2 * (h - 24.0)) ** 2 + (2 * (w - 20.0)) ** 2)
    labels = np.where(radius < 12, 2, np.where(radius < 18, 1, 0)).astype(np.uint8)
    image = np.where(across < 44, np.where(across < 36, 50.0, -100.0), -1000.0)
    image[:, 33:41, 20:28] = 700
    image[labels == 1], image[labels == 2] = 120, 400
    image += np.random.default_rng(0).normal(0, 8, shape)
    return Volume(np.rint(image).astype(np.int16), GRID), LabelVolume(labels, GRID)


def median(image: NDArray[np.floating], where: NDArray[np.bool_]) -> float:
    return float(np.median(image[where]))


def test_warp_tissues_by_hounsfield_units() -> None:
    image, mask = pair()
    classes = tissue_map(image.values, mask.labels, "HU")
    assert [TISSUES[classes[2, h, w]] for h, w in ((2, 2), (24, 44), (24, 38), (37, 24))] == [
        "gas",
        "fat",
        "soft",
        "dense",
    ]
    assert np.array_equal(classes >= len(TISSUES), mask.labels > 0)
    assert np.array_equal(
        classes[mask.labels == 2], np.full((mask.labels == 2).sum(), len(TISSUES) + 1)
    )


def test_warp_moves_image_with_mask() -> None:
    image, mask = pair()
    warp = Warp(image, mask)
    for variant in (1, 2, 3):
        moved, labels, warnings = warp.variant(seed=4, variant=variant)
        assert not warnings and np.array_equal(
            labels.labels, deform(mask, DeformationParams(), seed=4, variant=variant).volume.labels
        )
        assert not np.array_equal(labels.labels, mask.labels)
        for value, true in ((1, 120), (2, 400)):
            assert abs(median(moved, labels.labels == value) - true) < 12


def test_warp_identity_without_ranges_and_jitter() -> None:
    image, mask = pair()
    moved, labels, _ = Warp(image, mask, ranges=STILL).variant(seed=0, variant=3)
    assert np.array_equal(moved, image.values) and labels is mask


def test_jitter_moves_classes_within_deviation() -> None:
    image, mask = pair()
    warp = Warp(image, mask, ranges=STILL, jitter=IntensityJitter())
    bone = np.zeros(mask.labels.shape, bool)
    bone[:, 35:39, 22:26] = True
    shifts = np.array(
        [
            [
                median(moved, where) - median(image.values, where)
                for where in (mask.labels == 1, mask.labels == 2, bone)
            ]
            for moved in (warp.variant(seed, 0)[0] for seed in range(150))
        ]
    )
    expected = np.hypot(22, 12)
    assert (np.abs(shifts.mean(0)) < 4 * expected / np.sqrt(150)).all()
    assert (0.7 * expected < shifts.std(0)).all() and (shifts.std(0) < 1.4 * expected).all()
    assert (
        abs(np.corrcoef(shifts[:, 0], shifts[:, 1])[0, 1]) < 0.75
    )  # one common shift, and one of each class


def test_warp_keeps_air_outside() -> None:
    image, mask = pair()
    blank = np.where(image.values < -500, np.int16(-1000), image.values)
    moved, _, _ = Warp(Volume(blank, GRID), mask, ranges=STILL, jitter=IntensityJitter()).variant(
        1, 0
    )
    corner = moved[:, :6, :6]
    assert np.array_equal(corner, np.full(corner.shape, -1000, np.float32))


def test_warp_same_keys_same_pair() -> None:
    image, mask = pair()
    first = Warp(image, mask, jitter=IntensityJitter()).variant(7, 2)
    again = Warp(image, mask, jitter=IntensityJitter()).variant(7, 2)
    other = Warp(image, mask, jitter=IntensityJitter()).variant(8, 2)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1].labels, again[1].labels)
    assert not np.array_equal(first[0], other[0])


def test_arbitrary_units_scale_the_jitter() -> None:
    image, mask = pair()
    small = Volume((image.values.astype(np.float32) + 1100) / 1000, GRID)  # an MR of 0 to 3.6, say
    moved, _, _ = Warp(small, mask, ranges=STILL, jitter=IntensityJitter(), unit="a.u.").variant(
        0, 0
    )
    change = np.abs(moved - small.values)
    assert 0 < change.max() < 0.5


def test_warp_refuses_different_grids() -> None:
    image, mask = pair()
    elsewhere = LabelVolume(
        mask.labels, Geometry.from_parts((0.0, 0.0, 0.0), (2.0, 2.0, 3.0), np.eye(3).ravel())
    )
    with pytest.raises(InputError, match="grid"):
        Warp(image, elsewhere)
