"""How far a run is, for a program that shows it or stops it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["synthesizing", "written", "kept", "failed"]


@dataclass(frozen=True)
class ProgressEvent:
    """One step of a run, told in the thread that takes the results.

    Attributes:
        case: the name of the mask's case.
        variant: the number of the variant; None without variants, and for a mask that failed.
        stage: "synthesizing" after each slab, then "written"; or "kept", where a resumed run has
            the result already; or "failed".
        slices: slices of this CT that are synthesized.
        slices_total: slices of this CT; 0 where nothing was synthesized.
        done: CTs that are written, kept or failed.
        total: CTs of the whole run.
    """

    case: str
    variant: int | None
    stage: Stage
    slices: int
    slices_total: int
    done: int
    total: int
