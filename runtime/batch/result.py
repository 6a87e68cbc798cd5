"""The outcome of a batch for one mask in one variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import InputError, printable
from ..core.log import logger

_logger = logger(__name__)


@dataclass(frozen=True)
class CaseResult:
    """The outcome for one mask in one variant.

    Attributes:
        case: the name of the mask's case.
        mask: the path of the mask. For a DICOM source the name of the case, because its path may
            name a patient.
        variant: None when no variants were asked for.
        files: paths of the result.
        slices: number of axial slices.
        seconds: working time of each stage, without waiting; stages overlap.
        warnings: what a person should be told.
        error: why there is no result; None when there is one.
        input: SHA-256 of each file that was read, by file name.
        sha256: SHA-256 of each file that was written, by its path in the output folder.
        skipped: whether the journal proved the result complete, so that it was not made again.
        mask_sha256: SHA-256 of all that the mask was read from, as the journal has it.
        image_sha256: the same of the real CT that is deformed with the mask, or that gives a
            synthetic CT its layout; empty without one.
    """

    case: str
    mask: Path
    variant: int | None
    files: tuple[Path, ...] = ()
    slices: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: InputError | None = None
    input: Mapping[str, str] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    skipped: bool = False
    mask_sha256: str = ""
    image_sha256: str = ""


def log_result(result: CaseResult) -> None:
    """Log what a program that embeds the runtime may want to show of a result.

    Args:
        result: the outcome for one mask in one variant.
    """
    variant = "" if result.variant is None else f", variant {result.variant}"
    name = printable(result.mask.name) + variant
    for warning in result.warnings:
        _logger.warning("%s", printable(warning))
    if result.error is not None:
        _logger.error("%s", result.error)
    elif result.skipped:
        _logger.info("%s is complete already", name)
    else:
        _logger.info("synthesized %s: %d slices", name, result.slices)
