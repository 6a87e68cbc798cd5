"""The seam between synthesis and writing: one result to write, and what every output format does
with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UsageError
from ...core.manifest import LabelTable, Manifest
from ...core.volume import CTSlab, LabelVolume


@dataclass(frozen=True)
class OutputRecord:
    """One result to write, all but its voxels: the mask that is synthesized, and what synthesized
    it.

    `variant` is None when no variants were asked for. `file`: the model file that the engine runs,
    a key of `manifest.files` (empty for the fake engine). `image_sha256`: of the real CT that was
    deformed; empty where the CT is synthetic.
    """

    case: str
    variant: int | None
    mask: LabelVolume
    manifest: Manifest
    backend: str
    file: str
    seed: int
    image_sha256: str = ""

    @property
    def name(self) -> str:
        """CASE, or CASE_v0, CASE_v1 … for variants."""
        return result_name(self.case, self.variant)


@dataclass(frozen=True)
class FormatOptions:
    """What the command line says about formats.

    `attach`: a DICOM series joins its mask's patient, study and frame of reference; `enhanced`: it
    is one multi-frame Enhanced CT and not a file a slice; `segmentation`: "binary", "labelmap" or
    "none", the SEG beside it.
    """

    attach: bool = False
    enhanced: bool = False
    segmentation: str = "binary"


DEFAULT_OPTIONS = FormatOptions()


class Format(Protocol):
    """How results become files.

    Made once a run, from `FormatOptions`; plain data, so that it may cross to another process.

    `check` raises `MissingComponent` or `UsageError` before any work when this cannot write results
    of that model into `output`; `check_mask` raises an `InputError` for a mask whose result it
    cannot write. `files` names what `write` will leave in `output` for one result: files, or a
    folder that is replaced as a whole; `is_ours` tells whether such a path was written by mask2ct
    and may be replaced. `write` takes the slabs as they are synthesized and returns those paths,
    each complete, with their digests (`runtime.batch.completion_log.digest_of`); several processes
    may write different results. `finish` is called once at the end of a run, by the one process
    that holds the folder's lock. Both raise `OutputError`.
    """

    def check(self, manifest: Manifest, output: Path) -> None: ...

    def check_mask(self, mask: LabelVolume) -> None: ...

    def files(self, output: Path, case: str, variant: int | None) -> tuple[Path, ...]: ...

    def is_ours(self, path: Path) -> bool: ...

    def write(
        self, output: Path, record: OutputRecord, slabs: Iterable[CTSlab]
    ) -> Mapping[Path, str]: ...

    def finish(self, output: Path, manifest: Manifest) -> None: ...


def result_name(case: str, variant: int | None) -> str:
    """The name of a result. Raises `UsageError` for a case name that would lead out of the
    output folder or hide in it.
    """
    if not case or case.startswith(".") or any(c in case for c in "/\\\0"):
        raise UsageError(
            f"the case name {case!r} cannot name a file",
            expected="a plain name: not empty, no path, no leading dot",
            remedy="rename the mask",
        )
    return case if variant is None else f"{case}_v{variant}"


def refuse_dicom_options(options: FormatOptions) -> None:
    """Raise `UsageError` for options that only a DICOM series knows: to pass over them would not
    be what was asked for.
    """
    for name in ("attach", "enhanced", "segmentation"):
        if getattr(options, name) != getattr(DEFAULT_OPTIONS, name):
            raise UsageError(
                f"--{name} is for DICOM",
                expected="--format dicom with it",
                remedy=f"add --format dicom, or leave --{name} out",
            )


def table_values(table: LabelTable) -> NDArray[Any]:
    """The table's own value of each model index (K + 1,), in the smallest of uint8, uint16,
    int16 and int32 that holds them all.
    """
    values = np.array([label.value for label in table.labels])
    kinds = (np.uint8, np.uint16, np.int16, np.int32)
    return values.astype(
        next(
            d for d in kinds if np.iinfo(d).min <= values.min() and values.max() <= np.iinfo(d).max
        )
    )
