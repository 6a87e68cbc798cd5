"""The arms of the comparison: of each a title, and a function that gives labelled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.core.deformation import DeformationParams, MaskDeformer
from runtime.core.layout import dense_volume
from runtime.core.manifest import Intensity
from runtime.core.volume import LabelVolume
from runtime.core.warp import IntensityJitter, Warp

from ..metrics.class_table import coloured_tissues
from .cohort import Case

# (mask or dense map, seed, variant) to an image (D, H, W)
Generate = Callable[[LabelVolume, int, int], NDArray[np.int16]]
# A real image to its context classes, uint8 (D, H, W): the layout of a generator with a context
Tissues = Callable[[Case], NDArray[np.uint8]]
VARIANTS = 3  # of every training image
REAL, ALL_REAL, SYNTHETIC = "real", "all-real", "real+synthetic"
WARP_JITTER, TABLE = "real+warp-jitter", "real+table"


@dataclass(frozen=True)
class Sources:
    """What the images of an arm may be made of.

    Attributes:
        few: the training patients' images; the generator was trained on these alone.
        everyone: all patients' images that are not tested on.
        intensity: unit and range of the images.
        seed: of everything that is drawn.
        variants: images made of every training image.
        generate: the generator, where an arm needs one.
        tissues: gives the layout of a training patient; None: the generator takes the mask alone.
    """

    few: Sequence[Case]
    everyone: Sequence[Case]
    intensity: Intensity
    seed: int = 0
    variants: int = VARIANTS
    generate: Generate | None = None
    tissues: Tissues | None = None

    @property
    def numbers(self) -> range:
        """The variants' numbers; variant 0 would keep the patient's own shape."""
        return range(1, self.variants + 1)


@dataclass(frozen=True)
class Arm:
    """One arm: its title, its training images, and whether these need a generator."""

    title: str
    build: Callable[[Sources], Sequence[Case]]
    needs_generator: bool = False


def real(sources: Sources) -> Sequence[Case]:
    """The training patients' own images."""
    return sources.few


def warped(sources: Sources, jitter: IntensityJitter | None) -> list[Case]:
    """The real images deformed with their masks; `jitter`: how far intensities move."""
    cases = []
    for case in sources.few:
        warp = Warp(case.volume, case.mask, jitter=jitter, unit=sources.intensity.unit)
        cases += [_warped_case(case, warp, sources.seed, number) for number in sources.numbers]
    return cases


def synthetic(sources: Sources) -> list[Case]:
    """Deformed masks of the training patients, and the generator's images of them.

    A generator with a context gets the tissues around each mask, moved by the mask's own field.
    """
    assert sources.generate is not None
    cases = []
    for case in sources.few:
        deformer = MaskDeformer(case.mask, DeformationParams(), sources.seed)
        tissues = None if sources.tissues is None else sources.tissues(case)
        for number in sources.numbers:
            deformed, field = deformer.deformed(number)
            mask = deformed.volume
            condition = mask if tissues is None else dense_volume(mask, tissues, field)
            image = sources.generate(condition, sources.seed, number)
            cases.append(replace(case, image=image, labels=mask.labels))
    return cases


def class_table(sources: Sources) -> list[Case]:
    """The control without a network: see train/metrics/class_table.py."""
    samples = [(case.image, case.labels, case.spacing) for case in sources.few]
    coloured = coloured_tissues(samples, sources.intensity, sources.seed, sources.numbers)
    originals = [case for case in sources.few for _ in sources.numbers]
    return [
        replace(case, image=sample.image, labels=sample.labels)
        for case, sample in zip(originals, coloured, strict=True)
    ]


def _warped_case(case: Case, warp: Warp, seed: int, number: int) -> Case:
    image, mask, _ = warp.variant(seed, number)
    return replace(case, image=_to_int16(image), labels=mask.labels)


def _to_int16(image: NDArray[np.floating]) -> NDArray[np.int16]:
    return np.clip(np.rint(image), -32768, 32767).astype(np.int16)


ARMS: Mapping[str, Arm] = {
    REAL: Arm("real", real),
    SYNTHETIC: Arm("real + synthetic", lambda s: [*s.few, *synthetic(s)], True),
    "real+warp": Arm("real + warp", lambda s: [*s.few, *warped(s, None)]),
    WARP_JITTER: Arm("real + warp with jitter", lambda s: [*s.few, *warped(s, IntensityJitter())]),
    "real+both": Arm(
        "real + synthetic + warp with jitter",
        lambda s: [*s.few, *synthetic(s), *warped(s, IntensityJitter())],
        True,
    ),
    "synthetic": Arm("synthetic alone", synthetic, True),
    TABLE: Arm("real + class table", lambda s: [*s.few, *class_table(s)]),
    ALL_REAL: Arm("all real", lambda s: s.everyone),
}
