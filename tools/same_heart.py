"""How alike patients are who share a heart mask: the most that diversity over styles can reach.

    python tools/same_heart.py

Phantom patients share one heart, and all else is drawn anew. MS-SSIM between them is measured on
slices with labels, as train/metrics/volume_metrics.py measures it over styles and between patients.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from runtime.core.console import run
from train.metrics.volume_metrics import between_patients
from train.phantom.anatomy import Parameters, heart_pose
from train.phantom.cohort import draw, simulate


def same_heart(heart: Parameters, body: Parameters) -> Parameters:
    """Put a patient's body around another patient's heart.

    Args:
        heart: The patient whose heart is used, in its place.
        body: The patient whose contrast, build and bones are used.

    Returns:
        The new patient.
    """
    at = heart_pose(heart).origin
    moved = replace(
        body,
        heart=heart.heart,
        phase=heart.phase,
        yaw=heart.yaw,
        tilt=heart.tilt,
        roll=heart.roll,
        wall=heart.wall,
        warp=heart.warp,
        shift=(body.shift[0], body.shift[1], heart.shift[2]),
    )
    away = at - heart_pose(moved).origin
    return replace(moved, body=(moved.body[0] + float(away[0]), moved.body[1] + float(away[1])))


def main(argv: Sequence[str]) -> int:
    """Print MS-SSIM for each heart, and the mean as JSON; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        "same_heart.py", description="MS-SSIM between phantom patients who share a heart."
    )
    parser.add_argument("--hearts", type=int, default=4, help="hearts (default: %(default)s)")
    parser.add_argument(
        "--patients", type=int, default=4, help="patients of each heart (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    scores = []
    for index in range(options.hearts):
        heart = draw(2, index)
        patients = [
            simulate(same_heart(heart, draw(100 + index, n))) for n in range(options.patients)
        ]
        masks, images = [p.labels for p in patients], [p.hu for p in patients]
        if not all(np.array_equal(mask, masks[0]) for mask in masks):
            raise AssertionError("the hearts differ")
        scores.append(
            between_patients(images[::2], masks[::2], images[1::2], masks[1::2])["ms_ssim"]
        )
        print(f"heart {index}: MS-SSIM {scores[-1]:.3f}", flush=True)
    print(
        json.dumps(
            {
                "ms_ssim": round(float(np.mean(scores)), 4),
                "hearts": options.hearts,
                "patients": options.patients,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
