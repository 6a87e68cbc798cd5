"""The public class `Synthesizer`, for programs that embed mask2ct.

What handles files is imported when files are asked for: a program that calls the class with arrays
starts without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .core.deprecated import warn_renamed
from .core.labels import names_of
from .core.volume import LabelVolume
from .synthesizer import VolumeSynthesizer

if TYPE_CHECKING:
    from .batch.runner import CaseResult
    from .io.cases import ReadOptions


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
        reading: ReadOptions | None = None,
        **options: Any,
    ) -> Iterator[CaseResult]:
        """Synthesize files, folders and zips into a folder.

        Args:
            masks: One path or several; a folder is searched.
            output: The folder to write into; it is created.
            reading: How readers treat overlaps, fractions and missing references.
            options: The other fields of `runtime.batch.plan.Plan` (`format`, `variants`, `seed`,
                `resume`, …), and `on_slice`, which is called with the number of slices done.

        Returns:
            A result for each mask and variant, once it is written. A case that failed has `error`.

        Raises:
            UsageError: An option is wrong. Raised at once, before any work.
            OutputError: The folder cannot be written, or another run writes into it.
        """
        from .batch.runner import synthesize
        from .io.case_finding import find_cases

        paths = [Path(mask) for mask in ([masks] if isinstance(masks, (str, Path)) else masks)]
        names = names_of(options.get("labels"), [self.manifest.labels])
        cases = find_cases(paths, options=reading, names=names)
        return synthesize(self, cases, Path(output), **options)

    def paint(self, volume: LabelVolume, *, seed: int = 0, variant: int = 0) -> NDArray[np.int16]:
        """`synthesize`, under its name in mask2ct 0.1."""
        warn_renamed("Synthesizer.paint", "Synthesizer.synthesize")
        return self.synthesize(volume, seed=seed, variant=variant)
