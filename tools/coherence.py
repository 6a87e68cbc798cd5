"""Where slices that do not agree lie: python tools/coherence.py --synthetic DIR --truth DIR --masks
DIR

The distance of |I(z+1) - I(z)| over a whole body (train/metrics/volume_metrics.py) pools regions
whose errors cancel: an outline that flickers makes steps that ribs, synthesized as their mean, fail
to make. Here each region's steps are compared alone: the labels, the skin (near the true body's
outline), bone, lung and the rest. Regions are of the true CT.
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
NEAR = 3  # px, of the outline, to either side
BONE_HU, LUNG_HU = 180, -500


def regions(true: NDArray[Any], mask: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Of each pair of neighbouring slices of `true` (D, H, W) in HU the pixels of every region
    (D - 1, H, W); each in one at most.
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
    found = {
        "labels": _either(mask > 0),
        "skin": _either(skin),
        "bone": _either(bone),
        "lung": lung[1:] & lung[:-1],
    }
    left = inside[1:] & inside[:-1]
    for name, region in found.items():
        found[name] = region & left
        left = left & ~region
    return {**found, "rest": left}


def _either(slices: NDArray[np.bool_]) -> NDArray[np.bool_]:
    either: NDArray[np.bool_] = slices[1:] | slices[:-1]
    return either


def coherence(
    generated: Sequence[NDArray[Any]], true: Sequence[NDArray[Any]], masks: Sequence[NDArray[Any]]
) -> dict[str, dict[str, float]]:
    """{region: {"share" of the voxels, "step" and "step_true": mean |I(z+1) - I(z)| in HU,
    "distance": of their distributions (W1, HU), "error": mean difference in HU between a
    synthesized step and the true one in its place}}, and the same of the whole "body".
    """
    parts: dict[str, list[NDArray[np.int32]]] = {name: [] for name in REGIONS}
    for ours, theirs, mask in zip(generated, true, masks, strict=True):
        steps: NDArray[np.int32] = np.stack(
            [np.diff(volume.astype(np.int32), axis=0) for volume in (ours, theirs)]
        )
        for name, region in regions(theirs, mask).items():
            parts[name].append(steps[:, region])
    pooled = {name: np.concatenate(found, 1) for name, found in parts.items()}
    pooled["body"] = np.concatenate([*pooled.values()], 1)
    total = pooled["body"].shape[1]
    return {
        name: _numbers(ours, theirs, len(ours) / total)
        for name, (ours, theirs) in pooled.items()
        if len(ours)
    }


def _numbers(ours: NDArray[np.int32], theirs: NDArray[np.int32], share: float) -> dict[str, float]:
    a, b = np.abs(ours), np.abs(theirs)
    numbers = {
        "share": share,
        "step": a.mean(),
        "step_true": b.mean(),
        "distance": wasserstein(a, b),
        "error": np.abs(ours - theirs).mean(),
    }
    return {key: round(float(value), 4) for key, value in numbers.items()}


def main(argv: Sequence[str]) -> int:
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
            f"{name:<8}{o['share']:7.2f}{o['step']:8.1f}{o['step_true']:8.1f}{o['distance']:10.1f}{o['error']:8.1f}"
        )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
