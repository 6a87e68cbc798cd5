"""The held-out patients at one moment of a training: synthesized, measured, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.core.manifest import Intensity, LabelTable
from runtime.core.volume import Geometry
from runtime.viewer.page import Viewer

from .data.dataset import Slices, from_unit, noise_bytes
from .figures import comparison, window
from .metrics.distribution import PLANES, Sample, feature_distances
from .metrics.quality import quality
from .metrics.scores import diversity, evaluate, plain_tree, real_baseline
from .networks.generator import Generator, one_hot, standardise_noise
from .networks.style import organ_medians

# The number of styles that measure diversity.
STYLES = 16
# The most slices that are synthesized in all these styles.
DIVERSE_SLICES = 24
# The most bytes that the viewer's images take in a report.
VIEWER_BYTES = 20 << 20
# The label slices of each kind that a run folder stores for export.
MASKS_KEPT = 64


class Validation:
    """A fixed sample of the slices of some patients, with fixed noise.

    The sample consists of evenly spaced pairs of neighbours. Two moments of a training then differ
    by the network alone. A network that takes a style synthesizes the mean patient's; `STYLES`
    fixed styles measure its diversity.

    Args:
        patients: The patients.
        most: The most slices of all patients together.
        table: The labels.
        intensity: The intensity range.
        seed: The seed of the noise and of the styles.
        classes: The classes that the network sees; None: those of the table.
        contrast: Directions (K, classes) of the contrast in the image's unit, for a network whose
            style is the contrast.
    """

    def __init__(
        self,
        patients: tuple[Slices, ...],
        most: int,
        table: LabelTable,
        intensity: Intensity,
        seed: int,
        classes: int | None = None,
        contrast: NDArray[np.float32] | None = None,
    ):
        total = sum(map(len, patients))
        self._share = min(1.0, most / total)
        self.places = [neighbours(len(p), max(1, round(self._share * len(p)))) for p in patients]
        self._cases = [
            Slices(
                p.labels[chosen],
                p.image[chosen],
                tissues=None if p.tissues is None else p.tissues[chosen],
            )
            for p, chosen in zip(patients, self.places, strict=True)
        ]
        self.masks = [_middle(case) for case in self._cases]
        self._table, self._intensity, self._seed = table, intensity, seed
        self._classes = classes or len(table)
        self._contrast = contrast
        self._names = [label.name for label in table.labels[1:]]
        self._noise = [noise_bytes(c.image.shape, seed, n) for n, c in enumerate(self._cases)]

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The conditions of the sample, uint8 (n, Z, H, W) model indices."""
        return np.concatenate([case.condition() for case in self._cases])

    @property
    def images(self) -> list[NDArray[np.int16]]:
        """The true slices of each patient, HU int16 (n, H, W)."""
        return [case.image for case in self._cases]

    def measure(
        self, net: Generator, device: torch.device, batch_size: int
    ) -> tuple[dict[str, Any], list[NDArray[np.int16]]]:
        """Synthesize the sample and measure it.

        Args:
            net: The generator in eval mode.
            device: Where it lies.
            batch_size: Slices at a time.

        Returns:
            The metrics of train/metrics/scores.py, and the synthetic slices of each patient, HU
            int16 (n, H, W).
        """
        synthetic = [
            generate(
                net, case.condition(), noise, self._classes, self._intensity, device, batch_size
            )
            for case, noise in zip(self._cases, self._noise, strict=True)
        ]
        metrics = evaluate(
            synthetic, self.images, self.masks, self._names, self.places, self._intensity
        )
        samples, real = (self._samples(images) for images in (synthetic, self.images))
        distances = feature_distances(samples, real, self._intensity, PLANES[:1])
        metrics["distribution"] = plain_tree(distances)
        return metrics, synthetic

    def viewer(self, synthetic: list[NDArray[np.int16]]) -> str:
        """Write a viewer of the sample: synthetic slices beside the true ones.

        Args:
            synthetic: The slices that `measure` synthesized.

        Returns:
            HTML.
        """
        viewer = Viewer(
            dict(enumerate(self._names, 1)),
            self._intensity.unit,
            VIEWER_BYTES,
            axial_only=self._share < 1,
        )
        # The slices may lie apart: their distance is for the screen alone.
        geometry = Geometry.from_spacing((1, 1, 2))
        for n, (image, true, mask) in enumerate(
            zip(synthetic, self.images, self.masks, strict=True), 1
        ):
            for title, values in (("synthetic", image), ("true", true)):
                viewer.add(f"held-out patient {n}", title, values, geometry, mask)
        return viewer.html()

    def quality(
        self, synthetic: list[NDArray[np.int16]], train: Sequence[Slices]
    ) -> dict[str, Any]:
        """Measure synthetic slices beside the class table and the training patients.

        Args:
            synthetic: The slices that `measure` synthesized.
            train: The training patients.

        Returns:
            The `quality` of train/metrics/quality.py; coronal and sagittal planes where the sample
            is every slice.
        """
        return quality(
            self._samples(synthetic),
            self._samples(self.images),
            [Sample(patient.image, _middle(patient)) for patient in train],
            self._names,
            intensity=self._intensity,
            places=self.places,
            planes=PLANES if self._share == 1 else PLANES[:1],
            seed=self._seed,
        )

    def draw_worst(
        self, path: Path, synthetic: list[NDArray[np.int16]], label: str | None, title: str
    ) -> None:
        """Draw the slice that is farthest from the true one, in one label or anywhere.

        Args:
            path: The PNG file.
            synthetic: The slices that `measure` synthesized.
            label: The label's name.
            title: The figure's title.

        Raises:
            OutputError: The file cannot be written.
        """
        masks = np.concatenate(self.masks)
        images, true = np.concatenate(synthetic), np.concatenate(self.images)
        region = masks == 1 + self._names.index(label) if label in self._names else masks >= 0
        difference = np.abs(images.astype(np.int32) - true)
        sums = np.where(region, difference, 0).sum((1, 2))
        worst = slice(n := int(sums.argmax()), n + 1)
        comparison(
            path,
            masks[worst],
            images[worst],
            true[worst],
            classes=len(self._table),
            window=window(self._intensity),
            title=title,
        )

    def _samples(self, images: list[NDArray[np.int16]]) -> list[Sample]:
        """Images of the sample's slices with their labels."""
        return [Sample(image, mask) for image, mask in zip(images, self.masks, strict=True)]

    def diversity(
        self, net: Generator, device: torch.device, batch_size: int, train: Sequence[Slices]
    ) -> dict[str, Any] | None:
        """Measure how much the variants of one mask differ.

        The labelled slices of the first patient with labels are synthesized in many styles, each
        with its noise, as variants have it.

        Args:
            net: A generator that takes a style, in eval mode.
            device: Where it lies.
            batch_size: Slices at a time.
            train: The training patients, whose spread is the measure.

        Returns:
            The `diversity` of train/metrics/volume_metrics.py; None where no slice has a label.
        """
        first = next((n for n, mask in enumerate(self.masks) if mask.any()), None)
        if first is None:
            return None
        case = self._cases[first]
        labelled = np.flatnonzero(self.masks[first].any((1, 2)))
        chosen = labelled[
            np.linspace(0, len(labelled) - 1, min(len(labelled), DIVERSE_SLICES))
            .round()
            .astype(int)
        ]
        rng = np.random.default_rng(self._seed)
        if self._contrast is None:
            styles = rng.standard_normal((STYLES, net.style), np.float32)
        else:
            span = np.float32(self._intensity.high - self._intensity.low)
            drawn = rng.standard_normal((STYLES, len(self._contrast)), np.float32)
            styles = drawn @ self._contrast / span
        variants = [
            generate(
                net,
                case.condition(chosen),
                noise_bytes((len(chosen), *case.image.shape[1:]), self._seed, n),
                self._classes,
                self._intensity,
                device,
                batch_size,
                style,
            )
            for n, style in enumerate(styles)
        ]
        return diversity(
            [variants],
            [self.masks[first][chosen]],
            list(organ_medians(train, len(self._table))),
            self._names,
            self._intensity,
        )

    def real_baseline(self, train: Sequence[Slices]) -> dict[str, Any]:
        """Measure the distances between the held-out and the training patients.

        Args:
            train: The training patients.

        Returns:
            The `real_baseline` of train/metrics/volume_metrics.py, with the same share of their
            slices.
        """
        places = [neighbours(len(p), max(1, round(self._share * len(p)))) for p in train]
        images = [p.image[n] for p, n in zip(train, places, strict=True)]
        masks = [_middle(p)[n] for p, n in zip(train, places, strict=True)]
        return real_baseline(
            self.images,
            self.masks,
            images,
            masks,
            self._names,
            (self.places, places),
            self._intensity,
        )

    def draw(self, path: Path, synthetic: list[NDArray[np.int16]], title: str) -> None:
        """Draw three slices as condition, synthetic image and true image.

        Args:
            path: The PNG file.
            synthetic: The slices that `measure` synthesized.
            title: The figure's title.

        Raises:
            OutputError: The file cannot be written.
        """
        chosen = self._chosen()
        comparison(
            path,
            np.concatenate(self.masks)[chosen],
            np.concatenate(synthetic)[chosen],
            np.concatenate(self.images)[chosen],
            classes=len(self._table),
            window=window(self._intensity),
            title=title,
        )

    def sample(
        self, net: Generator, device: torch.device
    ) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.int16]]:
        """Synthesize the three slices that `draw` shows.

        Args:
            net: The generator in eval mode.
            device: Where it lies.

        Returns:
            Masks uint8, synthetic and true slices HU int16, each (3, H, W).
        """
        chosen = self._chosen()
        noise = np.concatenate(self._noise)[chosen]
        return (
            np.concatenate(self.masks)[chosen],
            generate(net, self.labels[chosen], noise, self._classes, self._intensity, device),
            np.concatenate(self.images)[chosen],
        )

    def _chosen(self) -> NDArray[np.intp]:
        """Three labelled slices apart from each other; any three where none has a label."""
        labelled = np.flatnonzero(np.concatenate(self.masks).any((1, 2)))
        if not len(labelled):
            labelled = np.arange(len(self.labels))
        return labelled[[len(labelled) // 5, len(labelled) // 2, len(labelled) * 4 // 5]]


def generate(
    net: Generator,
    labels: NDArray[np.uint8],
    noise: NDArray[np.uint8],
    classes: int,
    intensity: Intensity,
    device: torch.device,
    batch_size: int = 8,
    style: NDArray[np.float32] | None = None,
) -> NDArray[np.int16]:
    """Synthesize slices.

    Args:
        net: The generator in eval mode.
        labels: uint8 (n, Z, H, W) model indices.
        noise: uint8 (n, H, W), uniform bytes.
        classes: The number of labels, with the background.
        intensity: The intensity range.
        device: Where the generator lies.
        batch_size: Slices at a time.
        style: (S,), the style of all slices, as of one patient; None: the style 0.

    Returns:
        HU int16 (n, H, W).
    """
    out = []
    for at in range(0, len(labels), batch_size):
        condition = one_hot(torch.from_numpy(labels[at : at + batch_size]).to(device), classes)
        bytes_ = torch.from_numpy(noise[at : at + batch_size, None]).to(device)
        vector = (
            None if style is None else torch.from_numpy(style).to(device).expand(len(condition), -1)
        )
        with torch.no_grad():
            _, image = net(
                condition.contiguous(memory_format=torch.channels_last),
                standardise_noise(bytes_) if net.noisy else None,
                vector,
            )
        out.append(from_unit(image[:, 0].cpu().numpy(), intensity))
    return np.concatenate(out)


def label_maps(patients: Sequence[Slices], most: int) -> NDArray[np.uint8]:
    """Choose label maps, evenly spaced over the slices of all patients.

    Args:
        patients: The patients.
        most: The most label maps.

    Returns:
        uint8 (n, Z, H, W) model indices.
    """
    all_slices = [(patient, k) for patient in patients for k in range(len(patient))]
    chosen = np.linspace(0, len(all_slices) - 1, min(most, len(all_slices))).round().astype(int)
    return np.stack([patient.condition(k) for patient, k in (all_slices[n] for n in chosen)])


def _middle(patient: Slices) -> NDArray[np.uint8]:
    """The label map of the middle slice, (n, H, W)."""
    return patient.labels[:, patient.labels.shape[1] // 2]


def neighbours(total: int, count: int) -> NDArray[np.intp]:
    """Choose slices as evenly spaced pairs of neighbours.

    Args:
        total: The number of slices of a volume.
        count: The number of slices to choose; an odd one leaves one out.

    Returns:
        Rising slice numbers, none twice.
    """
    if count >= total:
        return np.arange(total)
    if count < 2:
        return np.array([total // 2])
    middles = (np.arange(count // 2) + 0.5) * total / (count // 2)
    first: NDArray[np.intp] = np.floor(middles - 1).astype(np.intp)
    return np.stack([first, first + 1], 1).ravel()
