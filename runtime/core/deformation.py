"""Other shapes of one anatomy: a mask rotated, scaled and smoothly deformed, its topology kept.

A free-form deformation on a lattice of cubic B-splines (Rueckert et al., IEEE TMI 18(8), 1999),
then an affine. Where no lattice point moves by LARGEST_MOVE of the lattice's spacing or more, the
deformation is injective with a positive Jacobian everywhere (Choi & Lee, Graphical Models 62(6),
2000), and an affine of positive scales and a rotation flips nothing: left stays left, unless
mirrored variants are asked for. The field is never held: each slice is evaluated from the lattice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .components import parts
from .errors import UsageError
from .rng import CaseRandom
from .volume import LabelVolume

LARGEST_MOVE = 0.403  # of the lattice's spacing: 1 / 2.48, Choi & Lee's bound in 3-D
SPACING = 48.0  # mm between lattice points; larger where the deformation asked for needs it
ATTEMPTS = 6  # draws, each of half the amplitude of the one before, until one keeps the topology


@dataclass(frozen=True)
class DeformationParams:
    """How far variants 1, 2 … may differ from the mask: `deform` mm that a lattice point moves
    along each axis, `rotate` degrees about each of the patient's axes, `scale` as a fraction along
    each. `topology`: draw again when a label's parts change. `mirror`: every second one, by chance,
    is mirrored left to right: another situs, which is plausible where the model's patients show
    both.
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
    """A variant's mask, on the grid of the mask it came from, and what is to be said of it."""

    volume: LabelVolume
    warnings: tuple[str, ...] = ()


def deform(
    volume: LabelVolume, ranges: DeformationParams, *, seed: int, variant: int
) -> DeformedMask:
    """Variant 0 is `volume` itself; the others are drawn from streams keyed by (seed, digest of
    `volume`, variant).

    A draw that makes a label vanish, split or merge is followed by one of half the amplitude; after
    ATTEMPTS of them the mask is kept as it is, and that is said. Labels that reach the border of
    the volume still do.
    """
    return MaskDeformer(volume, ranges, seed).deform(variant)


class MaskDeformer:
    """The variants of one volume; what they share is computed once."""

    def __init__(self, volume: LabelVolume, ranges: DeformationParams, seed: int):
        self._volume, self._ranges, self._seed = volume, ranges, seed

    def deform(self, variant: int) -> DeformedMask:
        return self.deformed(variant)[0]

    def deformed(self, variant: int) -> tuple[DeformedMask, DeformationField | None]:
        """As `vary`, with the field that moved the labels, for an image that is to move with
        them; None where nothing moved.
        """
        ranges = self._ranges
        random = CaseRandom(self._seed, self._volume.digest, variant)
        mirrored = ranges.mirror and bool(
            random.shape(ATTEMPTS, 1)[0] < 0
        )  # a draw of its own: all others stay what they are
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
        return (
            DeformedMask(
                self._volume,
                (
                    (
                        f"{ATTEMPTS} deformations changed how many parts a label has: the mask"
                        " keeps its shape"
                    ),
                ),
            ),
            None,
        )

    @cached_property
    def _parts(self) -> NDArray[np.int64]:
        return parts(self._volume.labels)

    @cached_property
    def _box(self) -> NDArray[np.int64] | None:
        """First and last index (2, 3) along the array's axes that holds a label; None for an
        empty mask.
        """
        labels = self._volume.labels
        planes = np.array([bool(plane.any()) for plane in labels])
        rows, columns = np.zeros(labels.shape[1], bool), np.zeros(labels.shape[2], bool)
        for plane in (labels[k] for k in np.flatnonzero(planes)):
            rows |= plane.any(1)
            columns |= plane.any(0)
        found = [np.flatnonzero(line) for line in (planes, rows, columns)]
        return np.array([[f[0] for f in found], [f[-1] for f in found]]) if planes.any() else None

    def _draw(self, field: DeformationField) -> NDArray[np.uint8]:
        """The labels moved by `field`, uint8 (D, H, W), nearest."""
        labels = np.ascontiguousarray(self._volume.labels)
        low, high = self._region(field.p, field.b, field.reach)

        out = np.zeros(labels.shape, np.uint8)
        rows, columns = np.arange(low[1], high[1]), np.arange(low[2], high[2])
        flat, last = labels.ravel(), np.array(labels.shape) - 1
        for k in range(low[0], high[0]):
            at = np.zeros((len(rows), len(columns)), np.intp)
            for axis in range(3):
                place = field.places(axis, k, rows, columns)
                np.rint(place, out=place)
                np.clip(place, 0, last[axis], out=place)  # past the border its last voxel stands in
                at *= labels.shape[axis]
                at += place.astype(np.intp)
            out[k, low[1] : high[1], low[2] : high[2]] = flat.take(at)
        return out

    def _field(self, random: CaseRandom, attempt: int, mirrored: bool) -> DeformationField:
        """The deformation of the `attempt`-th draw, whose amplitude is halved with each attempt.

        The mask must hold a label.
        """
        assert self._box is not None
        geometry, shape, ranges = self._volume.geometry, self._volume.labels.shape, self._ranges
        spacing, amplitude = np.array(geometry.spacing[::-1]), 0.5**attempt
        step = max(SPACING, ranges.deform / LARGEST_MOVE * 1.01)
        lines = [_Line(n, s / step) for n, s in zip(shape, spacing, strict=True)]
        lattice = [line.points for line in lines]
        drawn = random.shape(attempt, 6 + 3 * math.prod(lattice))  # uniform in [-1, 1)
        turn = _rotation(np.radians(ranges.rotate * amplitude) * drawn[:3]) * (
            1 + ranges.scale * amplitude * drawn[3:6]
        )
        turn[:, 0] *= -1 if mirrored else 1  # x runs to the patient's left

        # mm → voxels of the array's axes (d, h, w): a voxel q comes from the voxel P (q + moves(q))
        # + b, about the labels' middle
        axes = geometry.affine[:3, :3][:, ::-1]
        p = np.linalg.inv(axes) @ turn @ axes
        middle = self._box.mean(0)
        moves = (
            ranges.deform
            * amplitude
            * drawn[6:].reshape(3, *lattice)
            / spacing[:, None, None, None]
        )
        moves = np.stack([row[0] * moves[0] + row[1] * moves[1] + row[2] * moves[2] for row in p])
        return DeformationField(p, middle - p @ middle, moves, lines)

    def _region(
        self, p: NDArray[np.float64], b: NDArray[np.float64], reach: NDArray[np.float64]
    ) -> tuple[list[int], list[int]]:
        """The part of the array, first and one past the last index along each axis, beyond which
        no label can come to lie.
        """
        assert self._box is not None
        last = np.array(self._volume.labels.shape) - 1.0
        corners = (
            np.stack(np.meshgrid(*([0.0, n] for n in last), indexing="ij"), -1).reshape(-1, 3) @ p.T
            + b
        )
        first = (
            np.where(self._box[0] == 0, np.minimum(corners.min(0) - reach, 0), self._box[0])
            - reach
            - 1
        )
        final = (
            np.where(self._box[1] == last, np.maximum(corners.max(0) + reach, last), self._box[1])
            + reach
            + 1
        )
        box = np.stack(np.meshgrid(*zip(first, final, strict=True), indexing="ij"), -1).reshape(
            -1, 3
        )
        found = (box - b) @ np.linalg.inv(p).T
        low = np.clip(np.floor(found.min(0)), 0, last).astype(int)
        high = np.clip(np.ceil(found.max(0)), 0, last).astype(int) + 1
        return low.tolist(), high.tolist()


@dataclass(frozen=True)
class DeformationField:
    """Where each voxel of a deformed volume comes from: an affine (`p` (3, 3), `b` (3,)) and
    B-spline `moves` (3, *lattice), all in voxels of the array's axes (d, h, w). Nothing of the
    volume's size is held: a slice is evaluated when it is asked for.
    """

    p: NDArray[np.float64]
    b: NDArray[np.float64]
    moves: NDArray[np.float64]
    lines: list[_Line]

    @property
    def reach(self) -> NDArray[np.float64]:
        """The most voxels (3,) that a lattice point moves along each axis."""
        return np.asarray(np.abs(self.moves).reshape(3, -1).max(1))

    def places(
        self, axis: int, k: int, rows: NDArray[np.intp], columns: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """The source coordinate along `axis` (voxels, not clipped to the volume), float32 (rows,
        columns), of slice `k`.
        """
        field = self.lines[0].at(self.moves[axis], k)  # (lattice rows, lattice columns)
        field = self.lines[1].along(field, rows, 0).astype(np.float32)
        place = self.lines[2].along(field, columns, 1)
        place += (self.p[axis, 0] * k + self.p[axis, 1] * rows + self.b[axis]).astype(np.float32)[
            :, None
        ]
        place += (self.p[axis, 2] * columns).astype(np.float32)
        return place


class _Line:
    """One array axis of `count` voxels, `step` lattice spacings apart: cubic B-spline weights of
    the 4 lattice points about each.
    """

    def __init__(self, count: int, step: float):
        places = np.arange(count) * step
        self._cell = np.floor(places).astype(np.intp)
        t = places - self._cell
        r, t2, t3 = 1 - t, t * t, t * t * t  # products, not powers: the same bits on every machine
        self._weights = (
            np.stack([r * r * r, 3 * t3 - 6 * t2 + 4, -3 * t3 + 3 * t2 + 3 * t + 1, t3]) / 6
        )
        self.points = int(self._cell[-1]) + 4

    def at(self, lattice: NDArray[np.float64], k: int) -> NDArray[np.float64]:
        """The lattice (z, y, x) at voxel k of its first axis, (y, x)."""
        four = [lattice[self._cell[k] + n] * self._weights[n, k] for n in range(4)]
        return np.asarray(four[0] + four[1] + four[2] + four[3])

    def along(
        self, lattice: NDArray[np.floating], voxels: NDArray[np.intp], axis: int
    ) -> NDArray[np.floating]:
        """A lattice of two axes at `voxels` of one of them, in its own dtype: plain
        multiply-adds, the same bits on every machine.
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
    """About x, then y, then z, by `angles` in radians."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [n for n in range(3) if n != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        result = turn @ result
    return result
