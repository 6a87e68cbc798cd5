"""Variants of a mask: rotated, scaled and smoothly deformed, with the same topology.

A free-form deformation on a lattice of cubic B-splines (Rueckert et al., IEEE TMI 18(8), 1999),
then an affine. While each lattice point moves by less than LARGEST_MOVE of the lattice's spacing,
the deformation is injective with a positive Jacobian everywhere (Choi & Lee, Graphical Models
62(6), 2000). An affine of a rotation and positive scales keeps the orientation: left stays left,
except in mirrored variants. The field is never in memory: each slice is evaluated from the lattice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .components import parts
from .errors import UsageError
from .rng import CaseRandom
from .volume import LabelVolume

LARGEST_MOVE = 0.403  # of the lattice's spacing: 1 / 2.48, the bound of Choi & Lee in 3-D
SPACING = 48.0  # mm between lattice points; larger where the deformation needs it
ATTEMPTS = 6  # draws until one keeps the topology; each has half the amplitude of the one before


@dataclass(frozen=True)
class DeformationParams:
    """How far variants 1, 2 … may differ from the mask.

    Attributes:
        deform: The most that a lattice point moves along each axis, in mm.
        rotate: The largest rotation about each of the patient's axes, in degrees.
        scale: The largest change of size along each axis, as a fraction.
        topology: Draw again when the number of a label's components changes.
        mirror: Mirror each variant left to right with a probability of one half. That gives another
            situs, which is plausible where the model's patients show both.

    Raises:
        UsageError: A value is out of its range.
    """

    deform: float = 12.0
    rotate: float = 6.0
    scale: float = 0.08
    topology: bool = True
    mirror: bool = False

    def __post_init__(self) -> None:
        for name, value, most, unit in (
            ("deform", self.deform, 100, "mm"),
            ("rotate", self.rotate, 45, "degrees"),
            ("scale", self.scale, 0.5, ""),
        ):
            if not 0 <= value <= most:
                raise UsageError(
                    f"the range {name!r} is {value}",
                    expected=f"0 to {most} {unit}".strip(),
                    remedy="correct the option",
                )


@dataclass(frozen=True)
class DeformedMask:
    """The mask of a variant.

    Attributes:
        volume: The labels, on the grid of the mask they came from.
        warnings: Warnings for a person.
    """

    volume: LabelVolume
    warnings: tuple[str, ...] = ()


def deform(
    volume: LabelVolume, ranges: DeformationParams, *, seed: int, variant: int
) -> DeformedMask:
    """Deform a mask at random; the result depends on (seed, digest of `volume`, variant) alone.

    Where a label vanishes, splits or merges, the next draw has half the amplitude. After ATTEMPTS
    draws the mask keeps its shape, with a warning. Labels that reach the border of the volume still
    reach it.

    Args:
        volume: The mask.
        ranges: How far the variant may differ from the mask.
        seed: Seed of the draws.
        variant: The number of the variant; 0 is `volume` itself.
    """
    return MaskDeformer(volume, ranges, seed).deform(variant)


class MaskDeformer:
    """Deforms one mask many times; it computes only once what the variants share.

    Args:
        volume: The mask.
        ranges: How far the variants may differ from the mask.
        seed: Seed of the draws.
    """

    def __init__(self, volume: LabelVolume, ranges: DeformationParams, seed: int):
        self._volume, self._ranges, self._seed = volume, ranges, seed

    def deform(self, variant: int) -> DeformedMask:
        """One variant of the mask, as the function `deform` gives it.

        Args:
            variant: The number of the variant; 0 is the mask itself.
        """
        return self.deformed(variant)[0]

    def deformed(self, variant: int) -> tuple[DeformedMask, DeformationField | None]:
        """One variant, and the field that moved its labels, to move an image in the same way.

        Args:
            variant: The number of the variant; 0 is the mask itself.

        Returns:
            The mask, and the field; None where the mask keeps its shape.
        """
        ranges = self._ranges
        random = CaseRandom(self._seed, self._volume.digest, variant)
        # A separate draw, so that the numbers of the deformation do not depend on `mirror`.
        mirrored = ranges.mirror and bool(random.shape(ATTEMPTS, 1)[0] < 0)
        if (
            variant == 0
            or not (ranges.deform or ranges.rotate or ranges.scale or mirrored)
            or self._box is None
        ):
            return DeformedMask(self._volume), None
        for attempt in range(ATTEMPTS):
            field = self._field(random, attempt, mirrored)
            labels = self._draw(field)
            if not ranges.topology or np.array_equal(parts(labels), self._parts):
                return DeformedMask(replace(self._volume, labels=labels)), field
        warning = (
            f"{ATTEMPTS} deformations changed how many parts a label has: the mask keeps its shape"
        )
        return DeformedMask(self._volume, (warning,)), None

    @cached_property
    def _parts(self) -> NDArray[np.int64]:
        return parts(self._volume.labels)

    @cached_property
    def _box(self) -> NDArray[np.int64] | None:
        """First and last index with a label along each array axis (2, 3); None for no label."""
        labels = self._volume.labels
        planes = np.array([bool(plane.any()) for plane in labels])
        rows, columns = np.zeros(labels.shape[1], bool), np.zeros(labels.shape[2], bool)
        for plane in (labels[k] for k in np.flatnonzero(planes)):
            rows |= plane.any(1)
            columns |= plane.any(0)
        if not planes.any():
            return None
        labelled = [np.flatnonzero(line) for line in (planes, rows, columns)]
        return np.array([[index[0] for index in labelled], [index[-1] for index in labelled]])

    def _draw(self, field: DeformationField) -> NDArray[np.uint8]:
        """The labels moved by `field`, uint8 (D, H, W), nearest."""
        return move_labels(self._volume.labels, field, self._region(field.p, field.b, field.reach))

    def _field(self, random: CaseRandom, attempt: int, mirrored: bool) -> DeformationField:
        """The deformation of one attempt; the amplitude halves with each attempt.

        The mask must hold a label.
        """
        assert self._box is not None
        geometry, shape, ranges = self._volume.geometry, self._volume.labels.shape, self._ranges
        spacing, amplitude = np.array(geometry.spacing[::-1]), 0.5**attempt
        step = max(SPACING, ranges.deform / LARGEST_MOVE * 1.01)
        lines = [_Line(n, s / step) for n, s in zip(shape, spacing, strict=True)]
        lattice = [line.points for line in lines]
        draws = random.shape(attempt, 6 + 3 * math.prod(lattice))  # uniform in [-1, 1)
        angles = np.radians(ranges.rotate * amplitude)
        scales = 1 + ranges.scale * amplitude * draws[3:6]
        linear = _rotation(angles * draws[:3]) * scales
        linear[:, 0] *= -1 if mirrored else 1  # x runs to the patient's left

        # From mm to voxels of the array's axes (d, h, w): voxel q comes from the voxel
        # P (q + moves(q)) + b, about the middle of the labels.
        axes = geometry.affine[:3, :3][:, ::-1]
        p = np.linalg.inv(axes) @ linear @ axes
        middle = self._box.mean(0)
        lattice_draws = draws[6:].reshape(3, *lattice)
        moves = ranges.deform * amplitude * lattice_draws / spacing[:, None, None, None]
        moves = np.stack([row[0] * moves[0] + row[1] * moves[1] + row[2] * moves[2] for row in p])
        return DeformationField(p, middle - p @ middle, moves, lines)

    def _region(
        self, p: NDArray[np.float64], b: NDArray[np.float64], reach: NDArray[np.float64]
    ) -> tuple[list[int], list[int]]:
        """The part of the array that labels can move to.

        Returns:
            First and one past the last index along each axis.
        """
        assert self._box is not None
        last = np.array(self._volume.labels.shape) - 1.0
        corners = _corners(np.zeros(3), last) @ p.T + b
        # Labels at the border go on beyond it, as far as the volume's corners come from.
        first = np.where(self._box[0] == 0, np.minimum(corners.min(0) - reach, 0), self._box[0])
        final = np.where(
            self._box[1] == last, np.maximum(corners.max(0) + reach, last), self._box[1]
        )
        moved = (_corners(first - reach - 1, final + reach + 1) - b) @ np.linalg.inv(p).T
        low = np.clip(np.floor(moved.min(0)), 0, last).astype(int)
        high = np.clip(np.ceil(moved.max(0)), 0, last).astype(int) + 1
        return low.tolist(), high.tolist()


def move_labels(
    labels: NDArray[np.uint8],
    field: DeformationField,
    region: tuple[Sequence[int], Sequence[int]] | None = None,
) -> NDArray[np.uint8]:
    """Move labels by a field, with the nearest neighbour.

    Beyond the border of the volume its last voxel goes on.

    Args:
        labels: uint8 (D, H, W).
        field: Where each voxel comes from.
        region: First and one past the last index along each axis of the part to compute; the rest
            becomes 0. None: the complete volume.

    Returns:
        uint8 (D, H, W).
    """
    labels = np.ascontiguousarray(labels)
    low, high = ((0, 0, 0), labels.shape) if region is None else region
    out = np.zeros(labels.shape, np.uint8)
    rows, columns = np.arange(low[1], high[1]), np.arange(low[2], high[2])
    flat, last = labels.ravel(), np.array(labels.shape) - 1
    for k in range(low[0], high[0]):
        at = np.zeros((len(rows), len(columns)), np.intp)
        for axis in range(3):
            place = field.places(axis, k, rows, columns)
            np.rint(place, out=place)
            np.clip(place, 0, last[axis], out=place)
            at *= labels.shape[axis]
            at += place.astype(np.intp)
        out[k, low[1] : high[1], low[2] : high[2]] = flat.take(at)
    return out


def _corners(first: NDArray[np.float64], final: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 8 corners (8, 3) of a box between two points."""
    return np.stack(np.meshgrid(*zip(first, final, strict=True), indexing="ij"), -1).reshape(-1, 3)


@dataclass(frozen=True)
class DeformationField:
    """Where each voxel of a deformed volume comes from, evaluated one slice at a time.

    Attributes:
        p: Linear part (3, 3) of the affine, in voxels of the array's axes (d, h, w).
        b: Translation (3,) of the affine, in voxels.
        moves: B-spline coefficients (3, *lattice), in voxels.
        lines: The B-spline weights along each array axis.
    """

    p: NDArray[np.float64]
    b: NDArray[np.float64]
    moves: NDArray[np.float64]
    lines: list[_Line]

    @property
    def reach(self) -> NDArray[np.float64]:
        """The farthest that a lattice point moves along each axis (3,), in voxels."""
        return np.asarray(np.abs(self.moves).reshape(3, -1).max(1))

    def places(
        self, axis: int, k: int, rows: NDArray[np.intp], columns: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """The source coordinates of a part of slice `k`, along one axis.

        Args:
            axis: The array axis of the coordinate.
            k: Index of the slice.
            rows: Row indices (R,).
            columns: Column indices (C,).

        Returns:
            float32 (R, C) in voxels, not clipped to the volume.
        """
        field = self.lines[0].at(self.moves[axis], k)  # (lattice rows, lattice columns)
        field = self.lines[1].along(field, rows, 0).astype(np.float32)
        place = self.lines[2].along(field, columns, 1)
        of_rows = self.p[axis, 0] * k + self.p[axis, 1] * rows + self.b[axis]
        place += of_rows.astype(np.float32)[:, None]
        place += (self.p[axis, 2] * columns).astype(np.float32)
        return place


class _Line:
    """The cubic B-spline weights along one array axis, of 4 lattice points for each voxel.

    Args:
        count: Voxels along the axis.
        step: Distance of two voxels in lattice spacings.
    """

    def __init__(self, count: int, step: float):
        places = np.arange(count) * step
        self._cell = np.floor(places).astype(np.intp)
        t = places - self._cell
        # Products instead of powers, and sums in a fixed order: the same bits on every machine.
        r, t2, t3 = 1 - t, t * t, t * t * t
        weights = [r * r * r, 3 * t3 - 6 * t2 + 4, -3 * t3 + 3 * t2 + 3 * t + 1, t3]
        self._weights = np.stack(weights) / 6
        self.points = int(self._cell[-1]) + 4

    def at(self, lattice: NDArray[np.float64], k: int) -> NDArray[np.float64]:
        """The lattice (z, y, x) at voxel k of its first axis, (y, x)."""
        terms = [lattice[self._cell[k] + n] * self._weights[n, k] for n in range(4)]
        return np.asarray(terms[0] + terms[1] + terms[2] + terms[3])

    def along(
        self, lattice: NDArray[np.floating], voxels: NDArray[np.intp], axis: int
    ) -> NDArray[np.floating]:
        """A lattice of two axes at `voxels` of one of them, in the dtype of the lattice.

        It uses plain multiply-adds: the same bits on every machine.
        """
        weights = self._weights[:, voxels].astype(lattice.dtype)
        weights = weights[:, :, None] if axis == 0 else weights
        out = lattice.take(self._cell[voxels], axis)
        out *= weights[0]
        for n in range(1, 4):
            term = lattice.take(self._cell[voxels] + n, axis)
            term *= weights[n]
            out += term
        return out


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation (3, 3) about x, then y, then z, by `angles` in radians."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [n for n in range(3) if n != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        result = turn @ result
    return result
