"""Compare synthetic CTs with true ones: numpy arrays in, plain numbers out.

Validation, the report and `train.evaluate` use these metrics.

A case is a volume (D, H, W) of axial slices: synthetic HU, true HU, and model indices (0 is the
background). All voxels of an organ are pooled over the cases. Where images are in arbitrary units
instead of HU, the body is what is brighter than Otsu's threshold, and SSIM treats the run's range
as it treats that of HU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from runtime.core.manifest import Intensity, LabelTable

from . import volume_metrics
from .volume_metrics import (
    LEAST_VOXELS,
    LIMITS_HU,
    Places,
    outline_step,
    similarity,
    wasserstein,
    z_difference,
    z_error,
)

HU = Intensity("HU", *map(int, LIMITS_HU))
# Between air and fat.
BODY_HU = -500
# Parts of an image W pixels wide that are at most 2 W / THIN thick are not body: table, tubes.
THIN = 128
# In pixels: the texture is the image minus its Gaussian of this width.
TEXTURE_SIGMA = 2.0
# Pixels that an organ loses at its border before its texture is measured.
EROSION = 1

# The 4 neighbours in the slice.
_IN_PLANE = ndimage.generate_binary_structure(3, 1) & np.array([0, 1, 0], bool)[:, None, None]
Volumes = Sequence[NDArray[Any]]


def evaluate(
    synthetic: Volumes,
    truth: Volumes,
    masks: Volumes,
    names: Sequence[str],
    places: Places | None = None,
    intensity: Intensity = HU,
) -> dict[str, Any]:
    """Measure synthetic cases against true ones, in `intensity.unit`.

    Args:
        synthetic: Synthetic CTs.
        truth: True CTs.
        masks: Model indices.
        names: The names of the indices 1, 2, ...
        places: The slices' numbers in their volumes, where cases do not have all slices: only
            neighbours are compared along z.
        intensity: The images' unit and range.

    Returns:
        {"cases", "organs": {name: `organ`}, "body": `body`, "similarity": `similarity`}. An organ
        that is (almost) absent is None.
    """
    organs = {
        name: organ(synthetic, truth, masks, index, places) for index, name in enumerate(names, 1)
    }
    return {
        "cases": len(truth),
        "organs": organs,
        "body": body(synthetic, truth, masks, len(names) + 1, places, intensity),
        "similarity": _plain(**similarity(as_hu(synthetic, intensity), as_hu(truth, intensity))),
    }


def real_baseline(
    truth: Volumes,
    masks: Volumes,
    reference: Volumes,
    reference_masks: Volumes,
    names: Sequence[str],
    places: Sequence[Places | None] = (None, None),
    intensity: Intensity = HU,
) -> dict[str, Any]:
    """Measure the distances of `evaluate` between two groups of real patients.

    Args:
        truth: True CTs of one group.
        masks: Their model indices.
        reference: True CTs of the other group.
        reference_masks: Their model indices.
        names: The names of the indices 1, 2, ...
        places: The slices' numbers in their volumes, for each group.
        intensity: The images' unit and range.

    Returns:
        `volume_metrics.real_baseline`, as JSON data.
    """
    insides = [[body_mask(v, intensity) for v in volumes] for volumes in (truth, reference)]
    result = volume_metrics.real_baseline(
        truth, masks, reference, reference_masks, insides, names, places
    )
    if intensity.unit != HU.unit:
        result["similarity"] = volume_metrics.between_patients(
            as_hu(truth, intensity), masks, as_hu(reference, intensity), reference_masks
        )
    return plain_tree(result)


def diversity(
    variants: Sequence[Volumes],
    masks: Volumes,
    real: Sequence[NDArray[np.float64]],
    names: Sequence[str],
    intensity: Intensity = HU,
) -> dict[str, Any]:
    """Measure how much the variants of one mask differ: `volume_metrics.diversity`, as JSON data.

    Args:
        variants: The synthetic variants of each mask.
        masks: Model indices.
        real: The medians of each real patient, (organs,).
        names: The names of the indices 1, 2, ...
        intensity: The images' unit and range.

    Returns:
        JSON data.
    """
    result = volume_metrics.diversity(variants, masks, real, names)
    if intensity.unit != HU.unit:
        scaled = volume_metrics.diversity(
            [as_hu(generated, intensity) for generated in variants], masks, real, names
        )
        result |= {key: scaled[key] for key in ("ssim", "ms_ssim", "scales")}
    return plain_tree(result)


def organ(
    synthetic: Volumes, truth: Volumes, masks: Volumes, index: int, places: Places | None = None
) -> dict[str, float] | None:
    """Measure one organ over all cases' voxels.

    Args:
        synthetic: Synthetic CTs.
        truth: True CTs.
        masks: Model indices.
        index: The organ's index.
        places: As in `evaluate`.

    Returns:
        Median, interquartile range and texture, synthetic and true; the Wasserstein distance of the
        HU; `volume_metrics.z_difference` and `volume_metrics.z_error`. None for an organ that is
        (almost) absent.
    """
    inside = [mask == index for mask in masks]
    voxels = sum(int(m.sum()) for m in inside)
    if voxels < LEAST_VOXELS:
        return None
    generated, true = (
        np.concatenate([v[m] for v, m in zip(volumes, inside, strict=True)])
        for volumes in (synthetic, truth)
    )
    (q1, median, q3), (t1, true_median, t3) = (
        np.percentile(values, (25, 50, 75)) for values in (generated, true)
    )
    sd, true_sd = texture(synthetic, inside), texture(truth, inside)
    return _plain(
        voxels=voxels,
        median=median,
        median_true=true_median,
        median_error=median - true_median,
        iqr=q3 - q1,
        iqr_true=t3 - t1,
        wasserstein=wasserstein(generated, true),
        texture=sd,
        texture_true=true_sd,
        texture_ratio=sd / true_sd if true_sd else float("nan"),
        z_difference=z_difference((synthetic, truth), (inside, inside), (places, places)),
        z_error=z_error(synthetic, truth, inside, places),
    )


def body(
    synthetic: Volumes,
    truth: Volumes,
    masks: Volumes,
    classes: int,
    places: Places | None = None,
    intensity: Intensity = HU,
) -> dict[str, float] | None:
    """Measure the mean absolute error inside the true body, and its ratio to a baseline.

    The baseline, label means, gives every label and the rest of the body its true mean in that
    case.

    Args:
        synthetic: Synthetic CTs.
        truth: True CTs.
        masks: Model indices.
        classes: The number of labels, with the background.
        places: As in `evaluate`.
        intensity: The images' unit and range.

    Returns:
        The errors, and `z_difference`, `z_error` and `outline_step` of
        train/metrics/volume_metrics.py; None without a body.
    """
    error = baseline = 0.0
    voxels = 0
    insides = [body_mask(true, intensity) for true in truth]
    for generated, true, mask, inside in zip(synthetic, truth, masks, insides, strict=True):
        t, region = true[inside].astype(np.float64), mask[inside]
        counts = np.maximum(np.bincount(region, minlength=classes), 1)
        means = np.bincount(region, t, minlength=classes) / counts
        error += float(np.abs(generated[inside] - t).sum())
        baseline += float(np.abs(means[region] - t).sum())
        voxels += t.size
    if not voxels:
        return None
    return _plain(
        voxels=voxels,
        mae=error / voxels,
        mae_label_mean=baseline / voxels,
        mae_ratio=error / baseline if baseline else float("nan"),
        z_difference=z_difference((synthetic, truth), (insides, insides), (places, places)),
        z_error=z_error(synthetic, truth, insides, places),
        outline_step=outline_step([body_mask(generated) for generated in synthetic], places),
        outline_step_true=outline_step(insides, places),
    )


def body_mask(ct: NDArray[Any], intensity: Intensity = HU) -> NDArray[np.bool_]:
    """Find the patient's body slice by slice; lungs are inside, the table is not.

    Args:
        ct: A volume (D, H, W).
        intensity: The image's unit and range.

    Returns:
        bool (D, H, W).
    """
    result = np.zeros(ct.shape, bool)
    least = BODY_HU if intensity.unit == HU.unit else otsu(ct, intensity)
    for k, plane in enumerate(ct):
        tissue = ndimage.binary_opening(
            plane > least, iterations=max(1, round(plane.shape[1] / THIN))
        )
        parts, count = ndimage.label(tissue)
        if count:
            sizes = np.bincount(parts.ravel())[1:]
            result[k] = ndimage.binary_fill_holes(parts == 1 + int(sizes.argmax()))
    return result


def otsu(values: NDArray[Any], intensity: Intensity) -> float:
    """Find the threshold that separates two classes best (Otsu 1979).

    The histogram has 256 bins over the range.

    Args:
        values: Intensities, any shape.
        intensity: Their unit and range.

    Returns:
        The threshold.
    """
    counts, edges = np.histogram(
        np.clip(values, intensity.low, intensity.high), 256, (intensity.low, intensity.high)
    )
    share = counts.cumsum() / counts.sum()
    mean = (counts * (edges[:-1] + edges[1:]) / 2).cumsum() / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * share - mean) ** 2 / (share * (1 - share))
    return float(edges[1 + np.nan_to_num(between, posinf=0).argmax()])


def as_hu(volumes: Volumes, intensity: Intensity) -> Volumes:
    """Scale volumes in arbitrary units to the range of HU.

    Args:
        volumes: The volumes.
        intensity: Their unit and range.

    Returns:
        The volumes, with their range scaled to `LIMITS_HU` where they are not in HU.
    """
    if intensity.unit == HU.unit:
        return volumes
    scale = (HU.high - HU.low) / (intensity.high - intensity.low)
    return [
        (volume.astype(np.float32) - intensity.low) * np.float32(scale) + HU.low
        for volume in volumes
    ]


def texture(volumes: Volumes, inside: Sequence[NDArray[np.bool_]]) -> float:
    """Measure the standard deviation of (volume - its in-plane Gaussian) inside regions.

    Args:
        volumes: Volumes (D, H, W) in HU.
        inside: The regions, of which the border is left out.

    Returns:
        The deviation in HU, NaN where nothing is left.
    """
    residuals = []
    for volume, region in zip(volumes, inside, strict=True):
        core = ndimage.binary_erosion(region, _IN_PLANE, EROSION)
        if core.any():
            smooth = ndimage.gaussian_filter(
                volume.astype(np.float32), (0, TEXTURE_SIGMA, TEXTURE_SIGMA)
            )
            residuals.append((volume - smooth)[core])
    return float(np.std(np.concatenate(residuals))) if residuals else float("nan")


def table(result: dict[str, Any], unit: str = "HU") -> str:
    """Write the metrics as a table for a person; one line lists (almost) absent labels.

    Args:
        result: The metrics of `evaluate`, perhaps with "diversity" and "ceiling".
        unit: Their unit.

    Returns:
        Lines of text.
    """
    width = max([18, *(len(name) + 1 for name, o in result["organs"].items() if o is not None)])
    absent = [name for name, o in result["organs"].items() if o is None]
    head = ("median", "true", "error", "IQR", "true")
    more_head = (("texture", 9), ("true", 8), ("ratio", 7), ("W1", 7), ("z W1", 7))
    rows = [
        f"{unit:<{width}}"
        + "".join(f"{title:>8}" for title in head)
        + "".join(f"{title:>{columns}}" for title, columns in more_head)
    ]
    for name, o in result["organs"].items():
        if o is None:
            continue
        numbers = (o["median"], o["median_true"], o["median_error"], o["iqr"], o["iqr_true"])
        more = [
            (o["texture"], "9.1f"),
            (o["texture_true"], "8.1f"),
            (o["texture_ratio"], "7.2f"),
            (o["wasserstein"], "7.0f"),
            (o["z_difference"], "7.1f"),
        ]
        cells = [" " * int(how.split(".")[0]) if n is None else f"{n:{how}}" for n, how in more]
        end = "" if o["texture_ratio"] is None else "".join(cells)
        rows.append(f"{name:<{width}}" + "".join(f"{n:8.0f}" for n in numbers) + end)
    if absent:
        rows.append(f"absent, or almost: {', '.join(absent)}")
    if b := result["body"]:
        ratio = "" if b["mae_ratio"] is None else f", ratio {b['mae_ratio']:.3f}"
        rows.append(
            f"body: MAE {b['mae']:.1f} {unit}, label means {b['mae_label_mean']:.1f} {unit}{ratio}"
        )
        if b["z_difference"] is not None:
            rows.append(
                f"body: distance of |I(z+1) - I(z)| {b['z_difference']:.1f} {unit}, from the true"
                f" one in its place {b['z_error']:.1f} {unit}"
            )
        if b["outline_step"] is not None:
            rows.append(
                f"body: outline moves by {b['outline_step']:.0f} px from slice to slice, true"
                f" {b['outline_step_true']:.0f}"
            )
    if alike := result.get("similarity"):
        line = f"SSIM {alike['ssim']:.3f}"
        if alike["scales"]:
            line += f", MS-SSIM {alike['ms_ssim']:.3f} ({alike['scales']} scales)"
        rows.append(line)
    for name, o in result.get("diversity", {}).get("organs", {}).items():
        if o["ratio"] is not None:
            rows.append(
                f"{name:<{width}} median's spread {o['spread']:.0f} {unit} over styles,"
                f" {o['spread_true']:.0f} between patients: {o['ratio']:.2f}, median"
                f" {o['median_error']:+.0f} {unit} from theirs"
            )
    for what, alike in (
        ("over styles", result.get("diversity")),
        ("between patients", result.get("ceiling", {}).get("similarity")),
    ):
        if alike and alike["ms_ssim"] is not None:
            rows.append(f"MS-SSIM {what} {alike['ms_ssim']:.3f} ({alike['scales']} scales)")
    for name, o in result.get("ceiling", {}).get("organs", {}).items():
        if o["wasserstein"] is not None:
            rows.append(f"{name:<{width}} W1 {o['wasserstein']:.0f} {unit} between real and real")
    return "\n".join(rows)


def _plain(**numbers: float) -> dict[str, Any]:
    """Rounded Python numbers; NaN, which JSON lacks, becomes None."""
    return {
        k: v if isinstance(v, int) else round(float(v), 4) if np.isfinite(v) else None
        for k, v in numbers.items()
    }


def plain_tree(tree: Any) -> Any:
    """Round the numbers of nested dictionaries; NaN becomes None.

    Args:
        tree: Dictionaries, lists, numbers and None.

    Returns:
        JSON data.
    """
    if isinstance(tree, dict):
        return {key: plain_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain_tree(value) for value in tree]
    return tree if tree is None else _plain(value=tree)["value"]


def organ_names(labels: LabelTable) -> list[str]:
    """List the structures in the order of their indices 1, 2, ...

    Args:
        labels: The label table.

    Returns:
        The names, without the background's.
    """
    return [label.name for label in labels.labels[1:]]


def flat(metrics: dict[str, Any]) -> Iterable[tuple[str, float]]:
    """List every number of nested metrics, such as ("organs.left atrium.median", 455.0).

    Args:
        metrics: Nested dictionaries of numbers and None.

    Yields:
        (name, value).
    """
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", number) for name, number in flat(value))
        elif value is not None:
            yield key, value
