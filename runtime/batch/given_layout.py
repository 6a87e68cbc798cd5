"""A `CTSource` whose layout is given: a model synthesizes around each mask what its CT shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ..core.deformation import DeformationParams, MaskDeformer
from ..core.errors import UsageError
from ..core.layout import dense_volume
from ..core.manifest import Manifest
from ..core.tissue_classes import classes_of_volume
from ..core.volume import LabelVolume
from ..io.cases import Case
from ..io.ct_source import Variant
from ..io.readers.image import read_image
from ..synthesizer import VolumeSynthesizer


@dataclass(frozen=True)
class GivenLayout:
    """A model that takes the tissues around each mask from the mask's own CT (`Case.image`).

    The CT's intensities do not reach a result, but the shape of its patient does.

    Attributes:
        model: The open model; it has a context, and its unit is HU.

    Raises:
        UsageError: The model has no context, or its images are not in HU.
    """

    model: VolumeSynthesizer

    def __post_init__(self) -> None:
        manifest = self.model.manifest
        if manifest.context is None:
            raise UsageError(
                f"the model {manifest.name} has no context classes, so no CT can give it a layout",
                expected="a model whose manifest has a context",
                remedy="leave --context out, or use a model that was trained with data.context",
            )
        if manifest.intensity.unit != "HU":
            raise UsageError(
                f"the model {manifest.name} was trained in {manifest.intensity.unit}",
                expected="a model in HU, for which a CT gives the layout",
                remedy="leave --context out",
            )

    @property
    def manifest(self) -> Manifest:
        """The contract of the model."""
        return self.model.manifest

    @property
    def manifest_sha256(self) -> str:
        """The SHA-256 of the model's manifest.json; empty without one."""
        return self.model.manifest_sha256

    @property
    def backend(self) -> str:
        """The engine that runs, and why it was chosen."""
        return self.model.backend

    @property
    def engine(self) -> str:
        """The engine that runs. The digest of the CT is in the resume key beside it."""
        return self.model.engine

    @property
    def file(self) -> str:
        """The model file that runs."""
        return self.model.file

    def variants(
        self, case: Case, mask: LabelVolume, ranges: DeformationParams, seed: int
    ) -> Callable[[int], Variant]:
        """Read the case's CT, and return a function that makes each variant.

        One field moves the mask of a variant and the tissues around it.

        Args:
            case: With the CT in `image`.
            mask: Its labels.
            ranges: How far shapes may differ.
            seed: Seed of the deformation, the style and the noise.

        Returns:
            Variant number → `runtime.io.ct_source.Variant`; 0 has the shape of the mask.

        Raises:
            InputError: The CT is missing, or cannot be used with the mask.
        """
        manifest = self.manifest
        assert manifest.context is not None
        image = read_image(case, mask)
        labels = len(manifest.labels)
        tissues = classes_of_volume(
            image.values, mask.geometry, manifest.context, labels, manifest.grid
        )
        notes = image.notes
        del image
        deformer = MaskDeformer(mask, ranges, seed)

        def variant(number: int) -> Variant:
            deformed, field = deformer.deformed(number)
            dense = dense_volume(deformed.volume, tissues, field)
            # Here, so that the inference thread does not wait for it.
            dense.compute_digest()
            slabs = partial(self.model.slabs, dense, seed=seed, variant=number)
            nbytes = tissues.nbytes + deformed.volume.labels.nbytes + dense.labels.nbytes
            return Variant(deformed.volume, slabs, nbytes, (*notes, *deformed.warnings))

        return variant

    def notes(self, name: str, mask: LabelVolume) -> Iterator[str]:
        """Yield warnings about a mask that is allowed, but may be a mistake.

        Args:
            name: What the warnings call the mask.
            mask: Its labels.
        """
        yield from self.model.notes(name, mask)
