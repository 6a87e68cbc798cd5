"""The public class `Synthesizer`, for programs that embed mask2ct.

What handles files is imported when files are asked for: a program that calls the class with arrays
starts without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .core.deprecated import warn_renamed
from .core.labels import names_of
from .core.volume import LabelVolume
from .synthesizer import VolumeSynthesizer

if TYPE_CHECKING:
    from .batch.progress import ProgressEvent
    from .batch.runner import CaseResult
    from .core.deformation import DeformationParams
    from .core.labels import LabelMap
    from .io.cases import ReadOptions
    from .io.writers.registry import FormatOptions


class Synthesizer(VolumeSynthesizer):
    """An open model: label masks in, synthetic CT out.

    `VolumeSynthesizer` handles one volume and gives this class `open`, the call with an image,
    `synthesize`, `slabs`, `release` and `close`. `stream` handles files.
    """

    def stream(
        self,
        masks: str | Path | Iterable[str | Path],
        output: str | Path,
        *,
        format: str = "nifti",
        variants: int | None = None,
        seed: int = 0,
        ranges: DeformationParams | None = None,
        labels: LabelMap | None = None,
        resume: bool = False,
        replace: bool = True,
        shared: bool = False,
        options: FormatOptions | None = None,
        reading: ReadOptions | None = None,
        on_slice: Callable[[int], None] | None = None,
        on_progress: Callable[[ProgressEvent], None] | None = None,
    ) -> Iterator[CaseResult]:
        """Synthesize files, folders and zips into a folder.

        The options are those of `mask2ct synth`, with the same defaults. To stop, close the
        iterator, or raise in `on_progress`: complete results stay, nothing half-written does, and
        `resume` goes on.

        Args:
            masks: One path or several; a folder is searched.
            output: The folder to write into; it is created.
            format: A name of `runtime.io.writers.registry.FORMATS`.
            variants: How many CTs to make of each mask; None: one of the mask as it is.
            seed: Seed of all randomness.
            ranges: How far the masks of variants 1, 2 … may differ from the mask. Default:
                `DeformationParams()`.
            labels: Maps the masks' labels to the model's (`runtime.core.labels.load_map`). Default:
                their values and names.
            resume: Keep the results that the folder's journal proves complete.
            replace: A result may replace one of another mask; without it the mask is refused.
            shared: Results of a DICOM source get the permissions that the umask gives, not their
                owner's alone.
            options: Options of the format, for DICOM. Default: `FormatOptions()`.
            reading: How readers treat overlaps, fractions and missing references.
            on_slice: Called with the number of slices of the CT that are done.
            on_progress: Called with each step, in the thread that takes the results.

        Returns:
            A result for each mask and variant, once it is written. A case that failed has `error`.

        Raises:
            UsageError: An option is wrong. Raised at once, before any work.
            OutputError: The folder cannot be written, or another run writes into it.
        """
        from .batch.plan import Plan
        from .batch.runner import make
        from .io.case_finding import find_cases

        paths = [Path(mask) for mask in ([masks] if isinstance(masks, (str, Path)) else masks)]
        names = names_of(labels, [self.manifest.labels])
        cases = find_cases(paths, options=reading, names=names)
        plan_options = {
            "format": format,
            "variants": variants,
            "seed": seed,
            "ranges": ranges,
            "labels": labels,
            "resume": resume,
            "replace": replace,
            "shared": shared,
            "options": options,
        }
        plan = Plan.with_defaults(Path(output), plan_options)
        return make(self, cases, plan, on_slice, on_progress)

    def paint(self, volume: LabelVolume, *, seed: int = 0, variant: int = 0) -> NDArray[np.int16]:
        """`synthesize`, under its name in mask2ct 0.1."""
        warn_renamed("Synthesizer.paint", "Synthesizer.synthesize")
        return self.synthesize(volume, seed=seed, variant=variant)
