"""Many masks → many CTs: files in, files out, one bad case never stops the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .contract import LabelTable
from .errors import InputError, UsageError, writing
from .files import temporary_name
from .io.headers import SUFFIXES, stem
from .io.nifti import read_labels, write_nifti, write_values
from .volume import CTSlab, LabelVolume

if TYPE_CHECKING:
    from .synthesizer import Synthesizer

NOTICE = "SYNTHETIC CT - NOT FOR DIAGNOSIS (mask2ct)"  # what every header says of itself; 79 characters fit


@dataclass(frozen=True)
class CaseResult:
    """What became of one mask in one variant. `variant` is None when none were asked for; `error` is None when it is done."""

    case: str
    mask: Path
    variant: int | None
    files: tuple[Path, ...] = ()
    slices: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)  # wall time by stage
    warnings: tuple[str, ...] = ()
    error: InputError | None = None


def find_masks(arguments: Sequence[Path]) -> list[Path]:
    """Files as given, and for a folder the volumes directly in it, sorted. Raises `UsageError` when two share a case name.

    A path that does not exist stays in the list: it is that case's failure, not the run's.
    """
    masks: list[Path] = []
    for argument in arguments:
        if argument.is_dir():
            found = sorted(p for p in argument.iterdir() if p.name.lower().endswith(SUFFIXES) and not p.name.startswith("."))
            if not found:
                raise UsageError(
                    f"the folder {argument} holds no masks",
                    expected=f"files ending in {', '.join(SUFFIXES)}",
                    remedy="check the path",
                    file=argument,
                )
            masks += found
        else:
            masks.append(argument)
    seen: dict[str, Path] = {}
    for mask in masks:
        other = seen.setdefault(stem(mask), mask)
        if other != mask:
            raise UsageError(f"{other} and {mask} would both be written as {stem(mask)}_ct.nii.gz", expected="each case name once",
                             remedy="rename one, or run them into two output folders", file=mask)  # fmt: skip
    return list(seen.values())


def synthesize(
    synthesizer: Synthesizer,
    masks: Sequence[Path],
    output: Path,
    *,
    variants: int | None = None,
    seed: int = 0,
    labels: Mapping[int | None, int] | None = None,
    on_slice: Callable[[int], None] | None = None,
) -> Iterator[CaseResult]:
    """Paint each mask into `output`: CASE_ct.nii.gz; with `variants` = K, CASE_v0_ct.nii.gz and CASE_v0_mask.nii.gz … up to K - 1.

    Yields a result per file pair as soon as it is on disk. A mask that cannot be used yields its error and the next one
    follows; `OutputError` is raised, for what cannot be written for one cannot for any. `on_slice(n)` is told that
    n slices of the case are painted.
    """
    if variants is not None and variants < 1:
        raise UsageError(f"{variants} variants were asked for", expected="1 or more", remedy="leave the option out for one CT per mask")
    check_writable(output)
    for mask in masks:
        case, started = stem(mask), time.perf_counter()
        try:
            volume = read_labels(mask, synthesizer.manifest.labels, labels)
        except InputError as exc:
            exc.file = exc.file or mask
            yield CaseResult(case, mask, None, error=exc)
            continue
        read = time.perf_counter() - started
        warnings = tuple(_warnings(mask, volume, synthesizer))
        for variant in [None] if variants is None else range(variants):
            started = time.perf_counter()
            slabs = _Meter(synthesizer.slabs(volume, seed=seed, variant=variant or 0), on_slice)
            files = _write_pair(output, case, variant, volume, synthesizer.manifest.labels, slabs)
            seconds = {"read": read, "paint": slabs.seconds, "write": time.perf_counter() - started - slabs.seconds}
            yield CaseResult(case, mask, variant, files, slabs.slices, seconds, warnings)


def _warnings(mask: Path, volume: LabelVolume, synthesizer: Synthesizer) -> Iterator[str]:
    """What is allowed, but may not be meant."""
    if not volume.labels.any():
        yield f"{mask.name} is empty: no voxel has a label, the CT shows background alone"
    if not synthesizer.grid(volume).covers:
        policy, intensity = synthesizer.manifest.grid, synthesizer.manifest.intensity
        seen = " x ".join(f"{side * step:.0f}" for side, step in zip(policy.canvas, policy.pixel_spacing or (), strict=True))
        yield f"{mask.name} shows more than the {seen} mm the model was trained on: beyond them the CT is {intensity.low} {intensity.unit}"


class _Meter:
    """Passes slabs on, counting slices and the seconds spent making them."""

    def __init__(self, slabs: Iterator[CTSlab], on_slice: Callable[[int], None] | None):
        self._slabs, self._on_slice = slabs, on_slice
        self.slices, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[CTSlab]:
        while True:
            before = time.perf_counter()
            slab = next(self._slabs, None)
            self.seconds += time.perf_counter() - before
            if slab is None:
                return
            self.slices += slab.hu.shape[slab.axis]
            yield slab
            if self._on_slice is not None:
                self._on_slice(self.slices)


def _write_pair(
    output: Path, case: str, variant: int | None, volume: LabelVolume, table: LabelTable, slabs: Iterable[CTSlab]
) -> tuple[Path, ...]:
    """The CT, and its mask beside it when there are variants."""
    prefix = case if variant is None else f"{case}_v{variant}"
    depth, height, width = volume.labels.shape
    ct, mask = output / f"{prefix}_ct.nii.gz", output / f"{prefix}_mask.nii.gz"
    write_nifti(ct, slabs, (depth, height, width), volume.geometry, nifti_header=volume.nifti_header, description=NOTICE)
    if variant is None:
        return (ct,)
    write_values(mask, file_values(volume, table), volume.geometry, nifti_header=volume.nifti_header, description="mask of a " + NOTICE)
    return ct, mask


def file_values(volume: LabelVolume, table: LabelTable) -> NDArray[Any]:
    """Model indices back to the table's own values, uint8 where they fit, else uint16 (D, H, W)."""
    values = np.array([label.value for label in table.labels])
    return values.astype(np.uint8 if values.max() < 256 else np.uint16)[volume.labels]


def check_writable(output: Path) -> None:
    """Make the folder and a file in it, and take the file away again. Raises `OutputError` before any work is done."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(output / "probe")
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
