"""The seam that CTs come through: a model that generates them, or a real CT that is deformed with
its mask.

A `CTSource` opens a case and gives each of its variants: the mask, and its CT in slabs. Whoever
writes, resumes and reports knows no more of it than this.
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
    """One result to come.

    Attributes:
        mask: labels on the case's grid.
        slabs: computes the CT of that mask, int16, slab after slab; called once.
        nbytes: what holding this takes, in bytes.
        warnings: what a person should be told.
    """

    mask: LabelVolume
    slabs: Callable[[], Iterator[CTSlab]]
    nbytes: int
    warnings: tuple[str, ...] = ()


class CTSource(Protocol):
    """What makes CTs of masks: `Synthesizer` and `runtime.batch.warp_source.WarpSource`.

    Attributes:
        manifest: its label table, its unit, and whether its results are synthetic or derived.
        backend: what makes the CT, for people.
        engine: the same, exactly: with `manifest` and `file` what decides the bytes.
        file: the model file that runs; empty where there is none.
    """

    @property
    def manifest(self) -> Manifest: ...

    @property
    def backend(self) -> str: ...

    @property
    def engine(self) -> str: ...

    @property
    def file(self) -> str: ...

    def variants(
        self, case: Case, mask: LabelVolume, ranges: DeformationParams, seed: int
    ) -> Callable[[int], Variant]:
        """What gives variant 0 (the mask's own shape), 1, 2 … of a case whose mask was read.

        Raises `InputError`s for a case that it cannot use.
        """
        ...

    def notes(self, name: str, mask: LabelVolume) -> Iterator[str]:
        """What is allowed of a mask, but may not be meant. `name`: what to call it."""
        ...
