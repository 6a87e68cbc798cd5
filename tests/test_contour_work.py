"""Comparing the contours of a structure set has a bound, and pairs at once are pairs one by one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.core.errors import UnreadableVolume
from runtime.io.readers.clear_relations import relations
from runtime.io.readers.crossings import Outline, Relation, Work, relation
from runtime.io.readers.nesting import area


def polygon(draw: np.random.Generator, corners: int, whole: bool) -> NDArray[np.float64]:
    """A star around a place in 20 x 20 pixels; `whole`: with corners that others may share."""
    angles = np.sort(draw.uniform(0, 2 * np.pi, corners))
    radius = draw.uniform(0.2, 1, corners) * draw.choice([0.3, 2, 6, 12])
    place = draw.uniform(0, 20, 2)
    contour = place + radius[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
    return np.round(contour) if whole else contour


@pytest.mark.parametrize("whole", [False, True], ids=["anywhere", "on whole pixels"])
def test_many_relations_equal_single_ones(whole: bool) -> None:
    draw = np.random.default_rng(11)
    sizes = draw.choice([3, 4, 7, 8, 9, 16, 40, 64, 65, 90], 120)
    outlines = [Outline(polygon(draw, int(size), whole)) for size in sizes]
    outlines = [outline for outline in outlines if len(outline.corners)]
    pairs = [(n, m) for m in range(len(outlines)) for n in range(m)]
    pairs = [pairs[n] for n in draw.choice(len(pairs), 2500, replace=False)]
    expected = [relation(outlines[second], outlines[first], Work()) for first, second in pairs]
    assert [*relations(outlines, pairs, Work())] == expected
    assert {lies for lies, _ in expected} >= {Relation.APART, Relation.INSIDE, Relation.CROSSING}


def test_contours_of_all_slices_are_bounded() -> None:
    """60 circles that cross each other are read in ten slices, and not in an eleventh."""
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    circle = 60 * np.column_stack([np.cos(turn), np.sin(turn)])
    circles = [np.add(circle, (100 + n / 2, 100)) for n in range(60)]
    work = Work(10 * 4000 * 60 * 59 // 2)
    for _ in range(10):
        (component,) = area(circles, work=work).components
        assert len(component) == 60
    with pytest.raises(UnreadableVolume, match="too often for outlines"):
        area(circles, work=work)


def test_outlines_along_each_other_are_bounded() -> None:
    """Two scribbles whose 3,000 edges all lie beside those of the other."""
    draw = np.random.default_rng(2)
    scribbles = [
        Outline(np.column_stack([draw.uniform(0, 40, 3000), draw.uniform(0, 0.9, 3000)]))
        for _ in range(2)
    ]
    with pytest.raises(UnreadableVolume, match="too often for outlines"):
        relation(*scribbles, Work(1 << 24))
