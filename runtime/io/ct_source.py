"""The interface that CTs come through: a model that generates them, or a deformed real CT.

A `CTSource` opens a case and returns its variants: each a mask, and its CT in slabs. Code that
writes, resumes and reports uses nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..core.deformation import DeformationParams
from ..core.manifest import Manifest
from ..core.volume import CTSlab, LabelVolume

if TYPE_CHECKING:
    from .cases import Case


@dataclass(frozen=True)
class Variant:
    """One result to compute.

    Attributes:
        mask: Labels on the case's grid.
        slabs: Computes the CT of that mask slab by slab, int16; call it once.
        nbytes: Memory that the variant takes, in bytes.
        warnings: Messages for the user.
    """

    mask: LabelVolume
    slabs: Callable[[], Iterator[CTSlab]]
    nbytes: int
    warnings: tuple[str, ...] = ()


class CTSource(Protocol):
    """A source of CTs for masks.

    `Synthesizer`, `runtime.batch.given_layout.GivenLayout` and
    `runtime.batch.warp_source.WarpSource` are such.

    Attributes:
        manifest: Its label table, its unit, and whether its results are synthetic or derived.
        backend: What computes the CT, for people.
        engine: The same, exactly: with `manifest` and `file` it decides the bytes.
        file: The model file that runs; empty where there is none.
    """

    @property
    def manifest(self) -> Manifest:
        """Label table, unit, and whether results are synthetic or derived."""

    @property
    def backend(self) -> str:
        """What computes the CT, for people."""

    @property
    def engine(self) -> str:
        """What computes the CT, as part of the key for `--resume`."""

    @property
    def file(self) -> str:
        """The model file that runs; empty where there is none."""

    def variants(
        self, case: Case, mask: LabelVolume, ranges: DeformationParams, seed: int
    ) -> Callable[[int], Variant]:
        """Prepare the variants of a case.

        Args:
            case: Where the mask was read from.
            mask: Its labels.
            ranges: How far variants may be deformed.
            seed: Seed of the run.

        Returns:
            A function from the number of a variant to it: 0 has the mask's own shape, then 1, 2 and
                so on.

        Raises:
            InputError: The case cannot be used.
        """
        ...

    def notes(self, name: str, mask: LabelVolume) -> Iterator[str]:
        """Warnings about a mask that is allowed, but may be a mistake.

        Args:
            name: What the warnings call the mask.
            mask: Its labels.
        """
        ...
