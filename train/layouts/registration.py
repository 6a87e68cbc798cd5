"""Group-wise registration of class maps: a template, and a smooth field from each map to it.

The template is a probability of each class on a grid; a field is a lattice of cubic B-splines
(Rueckert et al., IEEE TMI 18(8), 1999). Fields and template are estimated in turns, as templates
are built without a bias towards one patient (Joshi et al., NeuroImage 23, 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from runtime.core.splines import SplineAxis

FLOOR = 0.01  # the least probability of a class, so that a far voxel still pulls
# Sigma in voxels of the template's blur, from the first round to the last.
BLURS = (3.0, 2.0, 1.2, 0.8, 0.5)
STEPS = 12  # of each round and map
STRIDE = (2, 3, 3)  # each step takes one voxel of so many, another one each time
RATE_MM = 1.2  # the first step of a lattice point
STIFFNESS = 0.02  # weight of the squared second differences of the lattice, per mm²
PULL = 2e-4  # weight of the squared moves, per mm²

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ClassMap:
    """The class of every voxel of a patient, on axial slices from the feet to the head.

    Attributes:
        classes: uint8 (D, H, W); `OUTSIDE` where nobody knows.
        start: The place of the first voxel (z, y, x) in mm, from the patient's anchor.
        step: The distance of voxels (z, y, x) in mm.
    """

    classes: NDArray[np.uint8]
    start: NDArray[np.float64]
    step: NDArray[np.float64]

    def axis(self, n: int) -> NDArray[np.float64]:
        """The places of the voxels along one axis, in mm."""
        return self.start[n] + self.step[n] * np.arange(self.classes.shape[n])


@dataclass(frozen=True)
class Lattice:
    """Where the lattice points of all fields lie.

    Attributes:
        start: The place of the first cell (z, y, x) in mm, from the anchor.
        spacing: The distance of lattice points, in mm.
        size: Lattice points along z, y and x.
    """

    start: NDArray[np.float64]
    spacing: float
    size: tuple[int, int, int]

    @classmethod
    def around(cls, low: NDArray[np.float64], high: NDArray[np.float64], spacing: float) -> Lattice:
        """The lattice that covers a box.

        Args:
            low: The box's first corner (z, y, x) in mm.
            high: The last corner.
            spacing: The distance of lattice points, in mm.
        """
        z, y, x = (int(n) + 3 for n in np.ceil((high - low) / spacing))
        return cls(low, spacing, (z, y, x))

    def matrices(self, axes: Sequence[NDArray[np.float64]]) -> list[Array]:
        """The weights of the lattice points at places along each axis, float32 (n, points)."""
        return [
            SplineAxis((places - self.start[n]) / self.spacing, self.size[n]).matrix(self.size[n])
            for n, places in enumerate(axes)
        ]


def evaluate(lattice: Array, matrices: Sequence[Array]) -> Array:
    """The field (3, D, H, W) of a lattice (3, *size)."""
    z, y, x = matrices
    field = np.einsum("akji,xi->akjx", lattice, x, optimize=True)
    field = np.einsum("akjx,yj->akyx", field, y, optimize=True)
    return np.asarray(np.einsum("akyx,zk->azyx", field, z, optimize=True))


def adjoint(field: Array, matrices: Sequence[Array]) -> Array:
    """The gradient of a lattice (3, *size), given that of its field (3, D, H, W)."""
    z, y, x = matrices
    out = np.einsum("azyx,zk->akyx", field, z, optimize=True)
    out = np.einsum("akyx,yj->akjx", out, y, optimize=True)
    return np.asarray(np.einsum("akjx,xi->akji", out, x, optimize=True))


class Registration:
    """Register class maps with a template that grows from them.

    Args:
        maps: The maps; all with the same `step`.
        classes: The number of classes; larger values are unknown.
        lattice: The lattice of the fields.
        low: First corner (z, y, x) of the template in mm.
        size: Voxels of the template along z, y and x.

    Attributes:
        fields: float32 (maps, 3, *lattice.size) in mm: place in the map → place in the template
            is the place plus the field.
    """

    def __init__(
        self,
        maps: Sequence[ClassMap],
        classes: int,
        lattice: Lattice,
        low: NDArray[np.float64],
        size: tuple[int, int, int],
    ):
        self._maps, self._classes, self._lattice = maps, classes, lattice
        self._low, self._size, self._step = low, size, maps[0].step
        self.fields = np.zeros((len(maps), 3, *lattice.size), np.float32)

    def run(self, blurs: Sequence[float] = BLURS) -> None:
        """Estimate template and fields in turns.

        Args:
            blurs: The template's blur of each round, in voxels.
        """
        for blur in blurs:
            template = self._log_template(blur)
            for n in range(len(self._maps)):
                self._register(n, template)
            # The template lies in the middle of the cohort.
            self.fields -= self.fields.mean(0)

    def shares(self, chosen: Sequence[NDArray[np.uint8]], classes: int) -> Array:
        """Splat class maps into the template's space.

        Args:
            chosen: For each map, classes on its grid; values from `classes` on are left out.
            classes: The number of classes.

        Returns:
            float32 (classes, *size), the number of voxels of each class.
        """
        indices = []
        for n, values in enumerate(chosen):
            z, y, x = (
                np.clip(np.rint(place), 0, count - 1).astype(np.int32)
                for place, count in zip(self._places(n), self._size, strict=True)
            )
            at = (z * self._size[1] + y) * self._size[2] + x
            keep = values < classes
            indices.append(values[keep].astype(np.int32) * int(np.prod(self._size)) + at[keep])
        counts = np.bincount(np.concatenate(indices), minlength=classes * int(np.prod(self._size)))
        total = counts.astype(np.float32)
        return total.reshape(classes, *self._size)

    def _places(self, n: int, take: Sequence[slice] = (slice(None),) * 3) -> list[Array]:
        """Where the voxels of a map lie in the template, in its voxels."""
        source = self._maps[n]
        axes = [source.axis(axis)[take[axis]] for axis in range(3)]
        field = evaluate(self.fields[n], self._lattice.matrices(axes))
        places = []
        for axis in range(3):
            shape = [1, 1, 1]
            shape[axis] = -1
            resting = ((axes[axis] - self._low[axis]) / self._step[axis]).astype(np.float32)
            places.append(field[axis] / np.float32(self._step[axis]) + resting.reshape(shape))
        return places

    def _log_template(self, blur: float) -> Array:
        """The logarithm of the blurred template, float32 (classes, *size)."""
        counts = self.shares([source.classes for source in self._maps], self._classes)
        for n in range(self._classes):
            counts[n] = ndimage.gaussian_filter(counts[n], blur, mode="nearest")
        total = counts.sum(0)
        shares = counts / np.maximum(total, 1e-3)
        return np.asarray(np.log(np.maximum(shares, FLOOR)), np.float32)

    def _register(self, n: int, template: Array) -> None:
        """Move one field so that the template explains the map."""
        source, lattice = self._maps[n], self.fields[n]
        first, second = np.zeros_like(lattice), np.zeros_like(lattice)
        volume = int(np.prod(self._size))
        flat_template = template.reshape(-1)
        for step in range(STEPS):
            offset = [(step * (axis + 1)) % STRIDE[axis] for axis in range(3)]
            take = [slice(o, None, n) for o, n in zip(offset, STRIDE, strict=True)]
            classes = source.classes[tuple(take)]
            has_class = classes < self._classes
            channel = np.where(has_class, classes, 0).astype(np.intp) * volume
            gradient = _slope(flat_template, channel, self._places(n, take), self._size)
            gradient *= has_class
            gradient /= self._step.astype(np.float32)[:, None, None, None]
            axes = [source.axis(axis)[take[axis]] for axis in range(3)]
            pull = -adjoint(gradient, self._lattice.matrices(axes))
            pull += STIFFNESS * _bending(lattice) + PULL * lattice
            first = 0.8 * first + 0.2 * pull
            second = 0.9 * second + 0.1 * np.square(pull).mean()
            scale = np.sqrt(second / (1 - 0.9 ** (step + 1))) + 1e-12
            rate = RATE_MM * (1 - step / STEPS)
            lattice -= np.clip(rate * first / (1 - 0.8 ** (step + 1)) / scale, -rate * 3, rate * 3)


def _bending(lattice: Array) -> Array:
    """The gradient of the sum of squared second differences along each axis."""
    out = np.zeros_like(lattice)
    for axis in (1, 2, 3):
        if lattice.shape[axis] < 3:
            continue
        bend = np.diff(lattice, 2, axis)
        for weight, start in ((1, 0), (-2, 1), (1, 2)):
            index = [slice(None)] * 4
            index[axis] = slice(start, start + bend.shape[axis])
            out[tuple(index)] += weight * bend
    return out


def _cells(
    places: Sequence[Array], size: tuple[int, int, int]
) -> tuple[list[NDArray[np.intp]], list[Array]]:
    """Lower corner, and weight of the upper one, along each axis; places outside are clipped."""
    lows: list[NDArray[np.intp]] = []
    weights: list[Array] = []
    for place, count in zip(places, size, strict=True):
        clipped = np.clip(place, 0, count - 1.001)
        low = clipped.astype(np.intp)
        lows.append(low)
        weights.append((clipped - low).astype(np.float32))
    return lows, weights


def _slope(
    template: Array, channel: NDArray[np.intp], places: Sequence[Array], size: tuple[int, int, int]
) -> Array:
    """The slope of the template's logarithm at places, per voxel, (3, D, H, W)."""
    (z, y, x), (wz, wy, wx) = _cells(places, size)
    base = channel + (z * size[1] + y) * size[2] + x
    row, plane = size[2], size[1] * size[2]
    v = {
        (a, b, c): template.take(base + (a * plane + b * row + c))
        for a in (0, 1)
        for b in (0, 1)
        for c in (0, 1)
    }

    def mix(low: Array, high: Array, weight: Array) -> Array:
        return low + weight * (high - low)

    alongx = {(a, b): mix(v[a, b, 0], v[a, b, 1], wx) for a in (0, 1) for b in (0, 1)}
    slope_x = {(a, b): v[a, b, 1] - v[a, b, 0] for a in (0, 1) for b in (0, 1)}
    rows = {a: mix(alongx[a, 0], alongx[a, 1], wy) for a in (0, 1)}
    return np.stack(
        [
            rows[1] - rows[0],
            mix(alongx[0, 1] - alongx[0, 0], alongx[1, 1] - alongx[1, 0], wz),
            mix(mix(slope_x[0, 0], slope_x[0, 1], wy), mix(slope_x[1, 0], slope_x[1, 1], wy), wz),
        ]
    )
