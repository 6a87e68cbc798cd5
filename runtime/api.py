"""The public classes: what a program that embeds mask2ct opens, calls and streams through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .batch import model_router, runner
from .core.deprecated import warn_renamed
from .core.labels import names_of
from .core.volume import LabelVolume
from .io.case_finding import find_cases
from .io.cases import ReadOptions
from .synthesizer import VolumeSynthesizer


class Synthesizer(VolumeSynthesizer):
    """A model folder, opened: label masks in, synthetic CT out.

    `open`, calling it with an image, `synthesize`, `slabs`, `release` and `close` come from
    `VolumeSynthesizer`, which handles one volume. `stream` handles files.
    """

    def stream(
        self,
        masks: str | Path | Iterable[str | Path],
        output: str | Path,
        *,
        reading: ReadOptions | None = None,
        **options: Any,
    ) -> Iterator[runner.CaseResult]:
        """Synthesize files, folders and zips into a folder.

        Args:
            masks: one path or several; a folder is searched.
            output: the folder to write into; it is made.
            reading: how overlaps, fractions and missing references are read.
            options: those of `runtime.batch.runner.synthesize` (`format`, `variants`, `seed`,
                `resume`, …).

        Returns:
            A result for each mask and variant, as it is written. A case that failed has `error`.

        Raises:
            UsageError: an option is wrong. Raised at once, before any work.
            OutputError: the folder cannot be written, or another run writes into it.
        """
        paths = [Path(mask) for mask in ([masks] if isinstance(masks, (str, Path)) else masks)]
        names = names_of(options.get("labels"), [self.manifest.labels])
        cases = find_cases(paths, options=reading, names=names)
        return runner.synthesize(self, cases, Path(output), **options)

    def paint(self, volume: LabelVolume, *, seed: int = 0, variant: int = 0) -> NDArray[np.int16]:
        """`synthesize` under its name of mask2ct 0.1."""
        warn_renamed("Synthesizer.synthesize", "Synthesizer.synthesize")
        return self.synthesize(volume, seed=seed, variant=variant)


class Models(model_router.Models):
    """Several model folders, opened as `Synthesizer`s under one memory budget."""

    synthesizer_class = Synthesizer

    def __getitem__(self, name: str) -> Synthesizer:
        return cast(Synthesizer, super().__getitem__(name))
