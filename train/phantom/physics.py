"""The imaging half of the phantom: implicit surfaces, and contrast, blur and noise of a CT scanner.

Coordinates are millimetres in the LPS frame (x to the patient's left, y posterior, z superior),
arrays are ``(Z, Y, X)``, attenuation is in Hounsfield units (HU). A surface is given by its signed
distance in mm, negative inside. Every function works point by point, so a volume may be computed in
slabs of any thickness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, special

# float32 for anything as large as a volume, float64 for points and radii.
Array = NDArray[np.floating[Any]]
# The distance in mm outside the box in which a surface is evaluated.
FAR = 60.0

# The duration of the contrast injection.
INJECTION_S = 16.0
# The time scale of the gamma-variate spread of the bolus, per unit shape.
DISPERSION_S = 2.0
DISPERSION_SHAPE = 2.5
# The start of the enhancement.
ARRIVAL_S = {"ra": 5.4, "rv": 6.0, "pa": 8.4, "la": 13.0, "lv": 13.4, "ao": 13.8}
# At unit dose.
PLATEAU_HU = {"ra": 475.0, "rv": 436.0, "pa": 450.0, "la": 500.0, "lv": 516.0, "ao": 514.0}
# Without contrast.
BLOOD_HU = 45.0

# In-plane point spread, and slice sensitivity profile.
PSF_SIGMA_MM = 1.1
SLICE_SIGMA_MM = 1.0
# The 1/e frequency of the reconstruction kernel's apodisation.
NOISE_CUTOFF_PER_MM = 0.32
# The pixel edge to which a noise level refers.
NOISE_REFERENCE_MM = 3.0
# The overlap of neighbouring slices.
NOISE_Z_SIGMA_MM = 1.5
# The attenuation of water at about 70 keV.
WATER_PER_MM = 0.0195
# The water-equivalent diameter to which a noise level refers.
REFERENCE_DIAMETER_MM = 250.0


@dataclass(frozen=True)
class Warp:
    """A smooth, volume-preserving deformation of one patient.

    Waves along the other coordinates shear each coordinate.
    """

    amplitude: float  # mm
    wavelength: float  # mm
    phase: tuple[float, ...]  # six angles, radians

    def wave(self, k: int, axis: Array) -> Array:
        """Compute the displacement by one wave.

        Args:
            k: The number of the wave, 0 to 5.
            axis: Positions in mm.

        Returns:
            Displacements in mm, float32.
        """
        return (
            self.amplitude * np.sin(axis * (2 * np.pi / self.wavelength) + self.phase[k])
        ).astype(np.float32)


@dataclass(frozen=True)
class Grid:
    """Sampling positions in mm along each axis (1-D float32), with an optional deformation."""

    z: Array
    y: Array
    x: Array
    warp: Warp | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of samples along z, y and x."""
        return len(self.z), len(self.y), len(self.x)

    def points(self) -> tuple[Array, Array, Array]:
        """Compute the coordinates of every sample.

        Returns:
            x, y and z in mm, as arrays that broadcast to ``shape``.
        """
        x, y, z = self.x[None, None, :], self.y[None, :, None], self.z[:, None, None]
        if self.warp is None:
            return x, y, z
        w = self.warp.wave
        return x + (w(0, y) + w(1, z)), y + (w(2, x) + w(3, z)), z + (w(4, x) + w(5, y))

    def box(self, low: Array, high: Array) -> tuple[tuple[slice, slice, slice], Grid]:
        """Select the samples between two corners.

        Args:
            low: The lower corner (x, y, z) in mm.
            high: The upper corner.

        Returns:
            The index of these samples, and their grid.
        """
        margin = 0.0 if self.warp is None else 2 * self.warp.amplitude

        def span(axis: Array, k: int) -> slice:
            return slice(
                *(int(i) for i in np.searchsorted(axis, (low[k] - margin, high[k] + margin)))
            )

        index = (span(self.z, 2), span(self.y, 1), span(self.x, 0))
        return index, Grid(self.z[index[0]], self.y[index[1]], self.x[index[2]], self.warp)


def sample_axes(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], finest: float
) -> tuple[tuple[int, int, int], Grid]:
    """Make the supersampling grid of a volume centred at the origin.

    Args:
        shape: (Z, Y, X).
        spacing: (z, y, x) in mm.
        finest: The largest distance of samples in mm.

    Returns:
        The number of samples per voxel along each axis, and the grid of all samples.
    """
    factor = tuple(max(1, int(np.ceil(edge / finest - 1e-6))) for edge in spacing)
    axes = [
        ((np.arange(n * f) + 0.5) / f - n / 2) * edge
        for n, f, edge in zip(shape, factor, spacing, strict=True)
    ]
    z, y, x = (axis.astype(np.float32) for axis in axes)
    return (factor[0], factor[1], factor[2]), Grid(z, y, x)


def blocks(volume: NDArray[Any], factor: tuple[int, int, int]) -> NDArray[Any]:
    """View a supersampled volume in blocks, one per voxel.

    Args:
        volume: (Z*f, Y*g, X*h).
        factor: (f, g, h).

    Returns:
        (Z, f, Y, g, X, h).
    """
    z, y, x = (n // f for n, f in zip(volume.shape, factor, strict=True))
    return volume.reshape(z, factor[0], y, factor[1], x, factor[2])


def blend(canvas: Array, distance: Array, value: float | Array, edge: float) -> None:
    """Mix a value into a volume, by the share of each sample inside a surface.

    Args:
        canvas: (Z, Y, X) in HU, changed in place.
        distance: The distance to the surface in mm.
        value: HU.
        edge: The width of a sample in mm.
    """
    share = np.clip(0.5 - distance / edge, 0.0, 1.0)
    canvas += share * (value - canvas)


def plane(grid: Grid, point: Array, normal: Array) -> Array:
    """Compute the distance to the half-space behind a plane.

    Args:
        grid: The sampling positions.
        point: A point of the plane (x, y, z) in mm.
        normal: Its outward normal, of any length.

    Returns:
        (Z, Y, X) in mm.
    """
    (x, y, z), origin = grid.points(), point.astype(np.float32)
    unit = (normal / np.linalg.norm(normal)).astype(np.float32)
    return (x - origin[0]) * unit[0] + (y - origin[1]) * unit[1] + (z - origin[2]) * unit[2]


def ellipsoid(grid: Grid, centre: Array, axes: Array, radii: Array, reach: float = 12.0) -> Array:
    """Compute the first-order distance to an ellipsoid.

    Args:
        grid: The sampling positions.
        centre: (x, y, z) in mm.
        axes: Unit vectors along its axes, one per row.
        radii: In mm.
        reach: The distance in mm outside up to which it is evaluated.

    Returns:
        (Z, Y, X) in mm.
    """
    result = np.full(grid.shape, FAR, np.float32)
    extent = np.sqrt(((axes.T * radii) ** 2).sum(1)) + reach
    index, near = grid.box(centre - extent, centre + extent)
    if 0 in near.shape:
        return result
    (x, y, z), origin = near.points(), centre.astype(np.float32)
    dx, dy, dz = x - origin[0], y - origin[1], z - origin[2]
    level, slope = np.zeros(near.shape, np.float32), np.zeros(near.shape, np.float32)
    for direction, radius in zip(axes.astype(np.float32), radii.astype(np.float32), strict=True):
        square = ((dx * direction[0] + dy * direction[1] + dz * direction[2]) / radius) ** 2
        level += square
        slope += square / radius**2
    root = np.sqrt(level)
    result[index] = root * (root - 1) / np.sqrt(slope + np.float32(1e-9))
    return result


def curve(points: Array, steps: int = 3) -> Array:
    """Draw a Catmull-Rom curve through points.

    Args:
        points: (n, 3).
        steps: Segments between neighbours.

    Returns:
        (steps * (n - 1) + 1, 3).
    """
    ends = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    a, b, c, d = (ends[i : len(ends) - 3 + i, None, :] for i in range(4))
    t = (np.arange(steps) / steps)[None, :, None]
    spline = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.vstack([spline.reshape(-1, 3), points[-1:]])


def tube(grid: Grid, path: Array, radius: Array, reach: float = 8.0) -> Array:
    """Compute the distance to a tube.

    Args:
        grid: The sampling positions.
        path: Points of the centreline (n, 3) in mm.
        radius: (n,) in mm.
        reach: The distance in mm outside up to which it is exact.

    Returns:
        (Z, Y, X) in mm.
    """
    result = np.full(grid.shape, FAR, np.float32)
    for a, b, ra, rb in zip(path[:-1], path[1:], radius[:-1], radius[1:], strict=True):
        margin = max(ra, rb) + reach
        index, near = grid.box(np.minimum(a, b) - margin, np.maximum(a, b) + margin)
        if 0 in near.shape:
            continue
        x, y, z = near.points()
        dx, dy, dz = x - np.float32(a[0]), y - np.float32(a[1]), z - np.float32(a[2])
        ab = (b - a).astype(np.float32)
        t = np.clip((dx * ab[0] + dy * ab[1] + dz * ab[2]) / np.float32(ab @ ab), 0, 1)
        d = np.sqrt((dx - t * ab[0]) ** 2 + (dy - t * ab[1]) ** 2 + (dz - t * ab[2]) ** 2)
        d -= np.float32(ra) + t * np.float32(rb - ra)
        np.minimum(result[index], d, out=result[index])
    return result


def smooth_union(a: Array, b: Array, k: float) -> Array:
    """Unite two surfaces with a fillet (Quilez's polynomial smooth minimum).

    Args:
        a: Distances in mm.
        b: Distances in mm.
        k: The size of the fillet in mm, roughly.

    Returns:
        Distances in mm.
    """
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * (k / 4)


def cut(solid: Array, *tools: Array) -> Array:
    """Cut tools off a solid.

    Args:
        solid: Distances in mm.
        *tools: Distances in mm.

    Returns:
        Distances in mm.
    """
    for tool in tools:
        solid = np.maximum(solid, -tool)
    return solid


def ring(distance: Array, thickness: float) -> Array:
    """Make the shell of a solid.

    Args:
        distance: Distances in mm.
        thickness: The depth of the shell in mm.

    Returns:
        Distances in mm.
    """
    return np.maximum(distance, -distance - thickness)


def enhancement(time_s: float, dose: float) -> dict[str, float]:
    """Compute the HU of the blood in each chamber at one time after the injection.

    The bolus is a box-shaped injection convolved with a gamma-variate transit (Thompson et al.
    1964, Circ Res 14:502; Bae 2010, Radiology 256:32), later and wider the farther downstream the
    chamber lies.

    Args:
        time_s: Seconds after the start of the injection.
        dose: Relative to the usual dose.

    Returns:
        HU by chamber.
    """

    def reached(age: float, scale: float) -> float:
        return float(special.gammainc(DISPERSION_SHAPE, max(age, 0.0) / scale))

    values = {}
    for chamber, start in ARRIVAL_S.items():
        scale, age = DISPERSION_S * (0.7 + start / 20), time_s - start
        share = reached(age, scale) - reached(age - INJECTION_S, scale)
        values[chamber] = BLOOD_HU + dose * PLATEAU_HU[chamber] * share
    return values


def blur(volume: Array, spacing: tuple[float, float, float]) -> Array:
    """Apply the scanner's resolution: a Gaussian in-plane point spread and slice profile.

    Args:
        volume: (Z, Y, X).
        spacing: (z, y, x) in mm.

    Returns:
        (Z, Y, X).
    """
    sigma = [
        s / edge
        for s, edge in zip((SLICE_SIGMA_MM, PSF_SIGMA_MM, PSF_SIGMA_MM), spacing, strict=True)
    ]
    return ndimage.gaussian_filter(volume, sigma, mode="nearest", truncate=3.0)


def noise_power(shape: tuple[int, int], spacing: tuple[float, float]) -> Array:
    """Compute the noise-power spectrum of filtered backprojection for a slice.

    |f| times the squared apodisation (Riederer, Pelc, Chesler 1978, Phys Med Biol 23:446; Kijewski,
    Judy 1987, Phys Med Biol 32:565), scaled to unit variance on a slice of ``NOISE_REFERENCE_MM``
    pixels.

    Args:
        shape: (Y, X).
        spacing: (y, x) in mm.

    Returns:
        mm^2 per unit HU^2, at the frequencies of rfft2.
    """

    def shaped(n: tuple[int, int], edge: tuple[float, float]) -> Array:
        f = np.hypot(np.fft.fftfreq(n[0], edge[0])[:, None], np.fft.fftfreq(n[1], edge[1])[None, :])
        return f * np.exp(-2 * (f / NOISE_CUTOFF_PER_MM) ** 2)

    reference = shaped((64, 64), (NOISE_REFERENCE_MM, NOISE_REFERENCE_MM))
    variance = reference.mean() / NOISE_REFERENCE_MM**2
    return (shaped(shape, spacing)[:, : shape[1] // 2 + 1] / variance).astype(np.float32)


def noise_field(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], rng: np.random.Generator
) -> Array:
    """Draw stationary CT noise, weakly correlated along z.

    Args:
        shape: (Z, Y, X).
        spacing: (z, y, x) in mm.
        rng: The random numbers.

    Returns:
        (Z, Y, X), of unit standard deviation at 3 mm pixels.
    """
    white = rng.standard_normal(shape, dtype=np.float32)
    power = noise_power(shape[1:], spacing[1:]) / (spacing[1] * spacing[2])
    along = np.exp(-2 * (np.pi * NOISE_Z_SIGMA_MM * np.fft.fftfreq(shape[0], spacing[0])) ** 2)
    along /= np.sqrt(np.mean(along**2))
    spectrum = fft.rfftn(white) * np.sqrt(power) * along[:, None, None].astype(np.float32)
    return fft.irfftn(spectrum, s=shape).astype(np.float32)


def noise_level(hu: Array, spacing: tuple[float, float, float], sigma: float) -> Array:
    """Compute the standard deviation of the noise at every voxel.

    Each slice's water-equivalent diameter (AAPM Report 220, 2014) sets its level, at half the
    exponent of an unmodulated tube current; the shorter rays through the periphery and through lung
    leave less noise.

    Args:
        hu: The body (Z, Y, X).
        spacing: (z, y, x) in mm.
        sigma: The deviation in HU at the centre of a 250 mm water cylinder.

    Returns:
        (Z, Y, X) in HU.
    """
    density = np.clip(1 + hu / 1000, 0, 1.6)
    mass = density.sum((1, 2))
    diameter = ndimage.gaussian_filter1d(
        2 * np.sqrt(mass * spacing[1] * spacing[2] / np.pi), 10 / spacing[0]
    )
    level = sigma * np.exp(WATER_PER_MM * (diameter - REFERENCE_DIAMETER_MM) / 4)
    depth = ndimage.gaussian_filter(
        density, [s / e for s, e in zip((6, 24, 24), spacing, strict=True)]
    )
    y, x = (
        edge * (np.arange(n) - (n - 1) / 2)
        for n, edge in zip(hu.shape[1:], spacing[1:], strict=True)
    )
    middle_y = (density.sum(2) @ y / mass)[:, None, None]
    middle_x = (density.sum(1) @ x / mass)[:, None, None]
    radius = (
        np.hypot(y[None, :, None] - middle_y, x[None, None, :] - middle_x) / diameter[:, None, None]
    )
    profile = np.exp(-1.1 * radius**2) * (0.55 + 0.45 * np.clip(depth, 0, 1))
    return (level[:, None, None] * profile).astype(np.float32)


def scan(
    hu: Array, spacing: tuple[float, float, float], sigma: float, rng: np.random.Generator
) -> NDArray[np.int16]:
    """Make the CT image of a body: blurred, noisy, rounded and clipped to [-1024, 3071].

    Args:
        hu: The body (Z, Y, X).
        spacing: (z, y, x) in mm.
        sigma: The noise's standard deviation in HU: see `noise_level`.
        rng: The random numbers.

    Returns:
        int16 (Z, Y, X) in HU.
    """
    image = blur(hu, spacing)
    image = image + noise_level(image, spacing, sigma) * noise_field(image.shape, spacing, rng)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)
