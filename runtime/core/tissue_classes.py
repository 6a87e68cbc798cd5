"""Tissue classes: what an image shows where no expert drew a label.

The one place that turns an image into classes: the training data, a layout that comes from a CT,
and the warping of real pairs (`runtime.core.warp`) use it. It needs numpy alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .components import plane_components
from .context import TABLE, Context
from .errors import UsageError
from .manifest import GridPolicy
from .resampling import axial_axes
from .volume import Geometry

# gas | fat | soft tissue | contrast, spongy bone | bone
HU_THRESHOLDS = (-500.0, -30.0, 130.0, 300.0)
TISSUES = ("gas", "fat", "soft", "mid", "dense")
# The tissues of an image that is not in HU, where intensities do not name a tissue.
GREYS = ("darkest", "dark", "middle", "bright", "brightest")
QUANTILES = (0.1, 0.35, 0.65, 0.9)  # the thresholds of an image that is not in HU
TISSUE_BLUR = 0.5  # sigma in pixels, before the thresholds, so that noise does not make classes
MAX_LABELS = 256 - len(TISSUES)  # with the background; classes are uint8
BINS = 1 << 16  # of a histogram, which counts integers within this range exactly

# The context of every image in HU. Air is -1000 HU, a lung hardly ever below -930.
HU_CONTEXT = Context(TISSUES, HU_THRESHOLDS, body=-500.0, air=-930.0, blur=TISSUE_BLUR)
# What is at most 1 / THIN of the slice's width thick is not body: table, tubes, blankets.
THIN = 64
# Solid parts smaller than this share of the largest one are not body.
LEAST_PART = 0.05


def context_map(
    image: NDArray[np.floating] | NDArray[np.integer],
    context: Context,
    labels: int,
    blur: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Find the context class of every voxel of an image, slice by slice.

    0 is outside the body (`body_mask`). Inside, the thresholds of the context decide. What is
    solid outside is the class "table". No voxel is "unknown".

    Args:
        image: (D, H, W) with axial slices along the first axis, in the context's unit.
        context: The rule.
        labels: The number of rows of the label table, with the background.
        blur: Sigma of the Gaussian along the two axes of a slice, in pixels; None: `context.blur`
            along both.

    Returns:
        uint8 (D, H, W): 0, or model indices from `labels` on.
    """
    return np.stack([context_plane(plane, context, labels, blur) for plane in image])


def context_plane(
    plane: NDArray[np.floating] | NDArray[np.integer],
    context: Context,
    labels: int,
    blur: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """`context_map` of one slice (H, W)."""
    smooth = gaussian(plane.astype(np.float32), *(blur or (context.blur, context.blur)))
    classes = np.zeros(plane.shape, np.uint8)
    for threshold in context.thresholds:
        classes += smooth >= threshold
    classes += np.uint8(labels)
    outside = ~body_mask(smooth, context)
    table = np.uint8(context.index(TABLE, labels))
    classes[outside] = np.where(smooth[outside] >= context.body, table, np.uint8(0))
    return classes


def dense_labels(labels: NDArray[np.uint8], context: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put expert labels on top of a context map.

    Args:
        labels: Model indices, any shape; 0 where no expert drew a label.
        context: What `context_map` returns, of the same shape.

    Returns:
        uint8 model indices of that shape.
    """
    return np.where(labels > 0, labels, context)


def classes_of_volume(
    image: NDArray[np.floating] | NDArray[np.integer],
    geometry: Geometry,
    context: Context,
    labels: int,
    policy: GridPolicy,
) -> NDArray[np.uint8]:
    """Find the context class of every voxel of a volume in any axis order.

    Where the image is finer than the model's grid, the blur is that of the model's grid, so that
    the noise of small voxels does not make classes.

    Args:
        image: (D, H, W), in the context's unit.
        geometry: Where the voxels lie.
        context: The rule.
        labels: The number of rows of the label table, with the background.
        policy: The model's grid.

    Returns:
        uint8 (D, H, W), as `context_map`.
    """
    slices, rows, columns = axial_axes(geometry)
    blur = {}
    for n, axis in enumerate((rows, columns)):
        if policy.pixel_spacing is None:
            scale = image.shape[axis] / policy.canvas[n]
        else:
            scale = policy.pixel_spacing[n] / geometry.spacing[2 - axis]
        blur[axis] = context.blur * max(1.0, scale)
    sigma = (blur[min(rows, columns)], blur[max(rows, columns)])
    classes = context_map(np.moveaxis(image, slices, 0), context, labels, sigma)
    return np.moveaxis(classes, 0, slices)


def body_mask(plane: NDArray[np.floating], context: Context) -> NDArray[np.bool_]:
    """Find the body in one slice; lungs are inside, the table is not.

    Solid parts lose what is thinner than 1 / `THIN` of the slice's width, except at the surface of
    what remains; small ones go. Gas that they enclose is inside. Gas at the slice's border is
    outside, unless its median is above `context.air`.

    Args:
        plane: (H, W), in the context's unit.
        context: The rule.

    Returns:
        bool (H, W).
    """
    steps = max(1, round(plane.shape[1] / THIN / 2))
    solid = plane >= context.body
    thick = _grown(~_grown(~solid, steps), steps)
    parts = plane_components(thick, corners=True)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    thick = (sizes >= max(1.0, LEAST_PART * sizes.max()))[parts]
    body = _grown(thick, 2 * steps) & solid
    gas = plane_components(~body, corners=False)
    edge = np.zeros(int(gas.max()) + 1, bool)
    for line in (gas[0], gas[-1], gas[:, 0], gas[:, -1]):
        edge[line] = True
    if context.air is not None and thick.any():
        for region in np.flatnonzero(edge):
            if region and float(np.median(plane[gas == region])) > context.air:
                edge[region] = False
    return body | ~edge[gas] if thick.any() else np.zeros(plane.shape, bool)


def cohort_context(unit: str, values: Histogram | None = None, body: float = 0.0) -> Context:
    """The context of a cohort, without medians.

    Args:
        unit: "HU", or another unit.
        values: For another unit, the intensities of the bodies outside the expert labels.
        body: For another unit, the least intensity of a solid part of the body.

    Returns:
        `HU_CONTEXT`, or one whose thresholds are the `QUANTILES` of `values`.
    """
    if unit == "HU":
        return HU_CONTEXT
    assert values is not None
    thresholds = tuple(round(values.quantile(share), 3) for share in QUANTILES)
    return Context(GREYS, thresholds, body=body, air=None, blur=TISSUE_BLUR)


def tissue_map(
    image: NDArray[np.floating], labels: NDArray[np.uint8], unit: str
) -> NDArray[np.uint8]:
    """The class of every voxel: its label, else its tissue by intensity.

    Args:
        image: (D, H, W), HU or arbitrary units.
        labels: uint8 (D, H, W), model indices; 0 is the background.
        unit: "HU" takes `HU_THRESHOLDS`, another unit the `QUANTILES` of the voxels without a
            label.

    Returns:
        uint8 (D, H, W): 0 to 4 for `TISSUES`, 5 and up for the labels 1 and up.

    Raises:
        UsageError: Labels and tissues are more than 256 classes.
    """
    if int(labels.max()) >= MAX_LABELS:
        raise UsageError(
            f"the mask holds label {labels.max()}",
            expected=f"at most {MAX_LABELS - 1} labels beside the tissues",
            remedy="map labels together with --labels MAP.json",
        )
    between = tissue_thresholds(image, labels, unit)
    return np.stack(
        [tissue_plane(plane, of, between) for plane, of in zip(image, labels, strict=True)]
    )


def tissue_thresholds(
    image: NDArray[np.floating], labels: NDArray[np.uint8], unit: str
) -> NDArray[np.float32]:
    """The thresholds between the tissues of one image, float32 (4,), in its unit.

    Args:
        image: (D, H, W).
        labels: uint8 (D, H, W), model indices.
        unit: As for `tissue_map`.
    """
    if unit == "HU":
        return np.array(HU_THRESHOLDS, np.float32)
    smooth = Histogram(float(image.min()), float(image.max()))
    is_labelled = bool((labels == 0).any())
    for plane, of in zip(image, labels, strict=True):
        blurred = gaussian(plane.astype(np.float32), TISSUE_BLUR)
        smooth.add(blurred[of == 0] if is_labelled else blurred)
    return np.array([smooth.quantile(share) for share in QUANTILES], np.float32)


def tissue_plane(
    plane: NDArray[np.floating], labels: NDArray[np.uint8], thresholds: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """`tissue_map` of one slice (H, W), with the thresholds of `tissue_thresholds`."""
    smooth = gaussian(plane.astype(np.float32), TISSUE_BLUR)
    classes = np.zeros(plane.shape, np.uint8)
    for threshold in thresholds:
        classes += smooth >= threshold
    return np.where(labels > 0, labels + np.uint8(len(TISSUES) - 1), classes)


class Histogram:
    """A histogram; integers are counted exactly where their range fits into `BINS`.

    Args:
        low: The lowest value.
        high: The highest value.
    """

    def __init__(self, low: float, high: float):
        self._low = low
        self._width = (
            1.0 if float(low).is_integer() and high - low < BINS else (high - low) / (BINS - 1)
        )
        self._counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[np.floating]) -> None:
        """Count the values of an array of any shape."""
        bins = np.rint((values.ravel() - self._low) / self._width).astype(np.intp)
        counts = np.bincount(np.clip(bins, 0, BINS - 1))
        self._counts[: len(counts)] += counts

    def quantile(self, share: float) -> float:
        """The quantile, interpolated linearly between two values.

        Args:
            share: Which quantile, 0 to 1.
        """
        counts = np.cumsum(self._counts)
        rank = share * (counts[-1] - 1)
        lower, upper = np.searchsorted(counts, [np.floor(rank), np.ceil(rank)], side="right")
        place = lower + (rank - np.floor(rank)) * (upper - lower)
        return float(self._low + place * self._width)


def gaussian(
    plane: NDArray[np.float32], sigma: float, along_columns: float | None = None
) -> NDArray[np.float32]:
    """A Gaussian filter over (H, W); the border values go on beyond it.

    Args:
        plane: float32 (H, W).
        sigma: Its width in pixels along the rows' axis.
        along_columns: Its width along the columns' axis; None: the same.

    Returns:
        float32 (H, W).
    """
    for axis, width in enumerate((sigma, sigma if along_columns is None else along_columns)):
        if not width:
            continue
        reach = max(1, int(np.ceil(3 * width)))
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
        kernel = (kernel / kernel.sum()).astype(np.float32)
        size = plane.shape[axis]
        pads = [(reach, reach) if n == axis else (0, 0) for n in (0, 1)]
        padded = np.pad(plane, pads, mode="edge")
        total = np.zeros(plane.shape, np.float32)
        for n, weight in enumerate(kernel):
            total += weight * (padded[n : n + size] if axis == 0 else padded[:, n : n + size])
        plane = total
    return plane


def _grown(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """`mask`, grown by `steps` pixels in a diamond; nothing comes in from beyond the border."""
    for _ in range(steps):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        mask = grown
    return mask
