"""tools/coherence.py: steps between slices, region by region, on volumes whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tools.coherence import REGIONS, coherence, regions
from train.metrics.scores import body, body_mask


def thorax(slices: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """(HU, mask): soft tissue with lung and one organ, and ribs on every third slice."""
    ct = np.full((slices, 64, 64), -1000, np.int16)
    ct[:, 8:56, 8:56] = 40
    ct[:, 20:40, 14:24] = -850
    mask = np.zeros(ct.shape, np.uint8)
    mask[:, 20:40, 30:44] = 1
    ct[mask == 1] = 400
    ct[1::3, 44:50, 12:52] = 640
    return ct, mask


def test_pixel_pairs_have_one_region() -> None:
    """Every pair of pixels of the body is in exactly one region."""
    ct, mask = thorax()
    found = regions(ct, mask)
    inside = body_mask(ct)[1:] & body_mask(ct)[:-1]
    assert list(found) == list(REGIONS)
    assert np.array_equal(sum(r.astype(int) for r in found.values()), inside.astype(int))
    assert (
        found["labels"][:, 20:40, 30:44].all()
        and found["lung"][:, 22:38, 16:22].all()
        and found["bone"][:, 44:50, 14:50].all()
    )


def test_cancelling_errors_show_in_regions() -> None:
    """Errors that cancel in the whole body are seen in their regions."""
    ct, mask = thorax()
    generated = ct.copy()
    generated[:, 44:50, 12:52] = 240  # ribs smeared over all slices
    generated[1::2, 8:11, 8:56] = -560  # a skin that flickers by as much as ribs step: 600
    found = coherence([generated], [ct], [mask])
    assert (
        found["labels"]["distance"] == found["lung"]["distance"] == 0
        and found["labels"]["error"] == 0
    )
    bone, skin = found["bone"], found["skin"]
    assert (
        bone["step"] == 0
        and bone["distance"] == pytest.approx(bone["step_true"])
        and bone["step_true"] > 50
    )
    assert (
        skin["step_true"] == 0
        and skin["distance"] == pytest.approx(skin["step"])
        and skin["step"] > 50
    )
    whole = body([generated], [ct], [mask], 2)
    assert whole is not None and found["body"]["distance"] == pytest.approx(
        whole["z_difference"], abs=1e-3
    )
    parts = sum(found[name]["share"] * found[name]["distance"] for name in REGIONS)
    assert found["body"]["distance"] < 0.7 * parts  # what cancels


def test_true_cts_have_zero_distance() -> None:
    ct, mask = thorax()
    assert all(
        o["distance"] == 0 == o["error"] and o["step"] == o["step_true"]
        for o in coherence([ct], [ct], [mask]).values()
    )
