"""The arms of the comparison: of each a title, and a function that gives labelled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from runtime.core.deformation import DeformationParams, MaskDeformer
from runtime.core.manifest import Intensity
from runtime.core.tissue_classes import tissue_map
from runtime.core.volume import LabelVolume
from runtime.core.warp import EDGE_BLUR, IntensityJitter, Warp

from .cohort import Case

# (mask, seed, variant) to an image (D, H, W)
Generate = Callable[[LabelVolume, int, int], NDArray[np.int16]]
VARIANTS = 3  # of every training image
NOISE_BLUR = 0.7  # pixels, of the class table's noise: a scanner's noise is not white
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
    """

    few: Sequence[Case]
    everyone: Sequence[Case]
    intensity: Intensity
    seed: int = 0
    variants: int = VARIANTS
    generate: Generate | None = None

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
    """Deformed masks of the training patients, and the generator's images of them."""
    assert sources.generate is not None
    cases = []
    for case in sources.few:
        deformer = MaskDeformer(case.mask, DeformationParams(), sources.seed)
        for number in sources.numbers:
            mask = deformer.deform(number).volume
            cases.append(
                replace(
                    case,
                    image=sources.generate(mask, sources.seed, number),
                    labels=mask.labels,
                )
            )
    return cases


def class_table(sources: Sources) -> list[Case]:
    """The control without a network: real tissue maps, deformed, coloured by class, with noise.

    A class has the median of the training patients, and noise as strong as its own spread.
    """
    unit = sources.intensity.unit
    maps = [tissue_map(c.image.astype(np.float32), c.labels, unit) for c in sources.few]
    medians, deviations = _class_statistics([case.image for case in sources.few], maps)
    rng = np.random.default_rng([sources.seed, 4])
    cases = []
    for case, classes in zip(sources.few, maps, strict=True):
        coloured = replace(case, image=np.rint(medians[classes]).astype(np.int16))
        warp = Warp(coloured.volume, case.mask, unit=unit)
        spread = deviations[classes]
        for number in sources.numbers:
            warped_case = _warped_case(case, warp, sources.seed, number)
            blur = (0, NOISE_BLUR, NOISE_BLUR)
            noise = gaussian_filter(rng.standard_normal(spread.shape), blur)
            image = gaussian_filter(warped_case.image.astype(np.float32), (0, EDGE_BLUR, EDGE_BLUR))
            cases.append(
                replace(warped_case, image=_to_int16(image + noise / noise.std() * spread)),
            )
    return cases


def _class_statistics(
    images: Sequence[NDArray[np.int16]],
    maps: Sequence[NDArray[np.uint8]],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Median and robust standard deviation (256,) of every class, over the voxels of all images."""
    medians, deviations = np.zeros(256, np.float32), np.zeros(256, np.float32)
    values = np.concatenate([image.ravel() for image in images])
    classes = np.concatenate([tissues.ravel() for tissues in maps])
    for number in np.unique(classes).tolist():
        low, middle, high = np.percentile(values[classes == number], (25, 50, 75))
        medians[number], deviations[number] = middle, (high - low) / 1.349
    return medians, deviations


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
