"""Synthetic cases among real patients: recognised, and kept with the patient of their source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from runtime.core.errors import UsageError
from runtime.io.marks import written_by_mask2ct
from runtime.io.writers.training_splits import SYNTHETIC_CASES, read_sources, source_of

from .pairs import Layout, Pair

# What image names end with, beside the name of the case.
ENDINGS = ("_0000", "_ct", "_mr", "_image", "_img")


def mark_synthetic(layout: Layout, path: Path) -> Layout:
    """Mark the pairs whose image mask2ct wrote, and give them the patient of their source.

    The source is stated by `synthetic.csv` in the folder, or by the name CASE_v0, CASE_v1 …

    Args:
        layout: The layout as its files state it.
        path: The folder or table of the dataset.

    Returns:
        The layout, which says how many cases are synthetic.

    Raises:
        UsageError: A table states that a synthetic case shall validate or test.
    """
    synthetic = {pair.image for pair in layout.pairs if written_by_mask2ct(pair.image)}
    if not synthetic:
        return layout
    folder = path.parent if path.is_file() else path
    sources = read_sources(folder) if (folder / SYNTHETIC_CASES).is_file() else {}
    patients = {case_of(pair): pair.who for pair in layout.pairs if pair.image not in synthetic}
    pairs = [
        _marked(pair, sources, patients) if pair.image in synthetic else pair
        for pair in layout.pairs
    ]
    note = (
        f"{len(synthetic)} of these images are synthetic: they train with the patient they were"
        " made from, and are never validated or tested on"
    )
    says = f"{layout.says}; {note}"
    return replace(layout, pairs=pairs, says=says)


def case_of(pair: Pair) -> str:
    """The name of a pair's case, without what tells an image from a mask.

    Args:
        pair: The pair.
    """
    return next((pair.name[: -len(e)] for e in ENDINGS if pair.name.endswith(e)), pair.name)


def _marked(pair: Pair, sources: Mapping[str, str], patients: Mapping[str, str]) -> Pair:
    """The pair with its source's patient, where the layout states none."""
    if pair.split in ("valid", "test"):
        raise UsageError(
            f"{pair.image.name} is synthetic, and its split is {pair.split}",
            expected="real patients to validate with and to test on",
            remedy="set its split to train, or drop its line",
            file=pair.image,
        )
    case = case_of(pair)
    source = sources.get(case) or source_of(case)
    return replace(pair, patient=pair.patient or patients.get(source, source), synthetic=True)
