"""Find the regions where neighbouring synthetic slices do not agree.

    python tools/coherence.py --synthetic DIR --truth DIR --masks DIR

The distance of |I(z+1) - I(z)| over the whole body (train/metrics/volume_metrics.py) pools regions
whose errors cancel: an outline that flickers makes steps, and ribs that are synthesized as their
mean lack them. This program compares each region's steps alone: the labels, the skin (near the true
body's outline), bone, lung and the rest. Regions are those of the true CT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from runtime.core.console import run
from runtime.core.labels import MM_WHS
from train.evaluate import read_cases
from train.metrics.scores import body_mask
from train.metrics.volume_metrics import wasserstein

REGIONS = ("labels", "skin", "bone", "lung", "rest")
NEAR = 3  # px to either side of the outline
BONE_HU, LUNG_HU = 180, -500


def regions(true: NDArray[Any], mask: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """The regions of each pair of neighbouring slices.

    Args:
        true: The true CT in HU (D, H, W).
        mask: Its labels (D, H, W), model indices.

    Returns:
        The pixels of every region (D - 1, H, W) by name. A pixel is in one region at most.
    """
    inside = body_mask(true)
    skin = np.stack(
        [
            ndimage.binary_dilation(s, iterations=NEAR)
            & ~ndimage.binary_erosion(s, iterations=NEAR)
            for s in inside
        ]
    )
    bone = ndimage.binary_dilation((true > BONE_HU) & (mask == 0), np.ones((3, 3, 3)))
    lung = true < LUNG_HU
    pixels = {
        "labels": _either(mask > 0),
        "skin": _either(skin),
        "bone": _either(bone),
        "lung": lung[1:] & lung[:-1],
    }
    remaining = inside[1:] & inside[:-1]
    for name, region in pixels.items():
        pixels[name] = region & remaining
        remaining = remaining & ~region
    return {**pixels, "rest": remaining}


def _either(slices: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels that are set in a slice or in the next one."""
    either: NDArray[np.bool_] = slices[1:] | slices[:-1]
    return either


def coherence(
    generated: Sequence[NDArray[Any]], true: Sequence[NDArray[Any]], masks: Sequence[NDArray[Any]]
) -> dict[str, dict[str, float]]:
    """Compare the steps between slices region by region.

    Args:
        generated: Synthetic CTs in HU (D, H, W).
        true: The true CTs of the same masks.
        masks: The masks, model indices.

    Returns:
        For each region, and for the whole "body": its "share" of the voxels, "step" and "step_true"
        (mean |I(z+1) - I(z)| in HU), "distance" (W1 between their distributions, HU) and "error"
        (mean difference in HU between a synthetic step and the true one in its place).
    """
    parts: dict[str, list[NDArray[np.int32]]] = {name: [] for name in REGIONS}
    for synthetic_ct, true_ct, mask in zip(generated, true, masks, strict=True):
        steps: NDArray[np.int32] = np.stack(
            [np.diff(volume.astype(np.int32), axis=0) for volume in (synthetic_ct, true_ct)]
        )
        for name, region in regions(true_ct, mask).items():
            parts[name].append(steps[:, region])
    pooled = {name: np.concatenate(arrays, 1) for name, arrays in parts.items()}
    pooled["body"] = np.concatenate([*pooled.values()], 1)
    total = pooled["body"].shape[1]
    return {
        name: _numbers(synthetic_steps, true_steps, len(synthetic_steps) / total)
        for name, (synthetic_steps, true_steps) in pooled.items()
        if len(synthetic_steps)
    }


def _numbers(
    synthetic: NDArray[np.int32], true: NDArray[np.int32], share: float
) -> dict[str, float]:
    """The figures of one region."""
    a, b = np.abs(synthetic), np.abs(true)
    numbers = {
        "share": share,
        "step": a.mean(),
        "step_true": b.mean(),
        "distance": wasserstein(a, b),
        "error": np.abs(synthetic - true).mean(),
    }
    return {key: round(float(value), 4) for key, value in numbers.items()}


def main(argv: Sequence[str]) -> int:
    """Print the table and the figures as JSON; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        "coherence.py", description="Where neighbouring slices of synthetic CTs do not agree."
    )
    for name in ("synthetic", "truth", "masks"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", required=True)
    options = parser.parse_args(argv)
    result = coherence(*read_cases(options.synthetic, options.truth, options.masks, MM_WHS))
    print(f"{'HU':<8}{'share':>7}{'step':>8}{'true':>8}{'distance':>10}{'error':>8}")
    for name, o in result.items():
        print(
            f"{name:<8}{o['share']:7.2f}{o['step']:8.1f}{o['step_true']:8.1f}"
            f"{o['distance']:10.1f}{o['error']:8.1f}"
        )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
