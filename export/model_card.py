"""MODEL_CARD.md: what a hospital reads before it uses a model, written from the manifest.

Mitchell et al., "Model Cards for Model Reporting", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.core.manifest import Manifest
from runtime.engines.description import (
    ORGAN_HEAD,
    PARITY_HEAD,
    export_lines,
    organ_rows,
    parity_rows,
    training_lines,
)
from train.metrics.quality_table import COLUMNS, LEGEND
from train.metrics.quality_table import rows as quality_rows

CARD = "MODEL_CARD.md"
UNLICENSED = (
    "**Not stated. Whoever trained this model must fill this in before it is passed on:** set"
    " `license` in the training's config and export again. What the training data's owners allow"
    " limits what may be allowed here."
)
INTENDED = (
    "Synthetic images for label masks, to enlarge or balance training sets for segmentation and"
    " other image analysis: the mask is the right answer to its image by construction.\n\n"
    "**Never for diagnosis.** No image that this model synthesizes shows a patient, and none may be"
    " used, shown or stored as if it did. The model must not be used to assess a person, to plan or"
    " guide treatment, or to fill in what a scan did not show."
)
LIMITS = (
    (
        "It synthesizes what it learned from the patients counted below, and no more: pathologies,"
        " ages, scanners, contrast phases and fields of view that were not among them are not"
        " synthesized faithfully."
    ),
    "Whatever the mask does not label (vessels, bones, fat, table) is invented to look plausible.",
    (
        "Slices are synthesized one by one from their own and neighbouring labels: structures that"
        " no label follows may not agree from slice to slice."
    ),
    (
        "A network trained on few patients may reproduce what is particular to them. Check that"
        " before the model leaves the institution whose data it was trained on."
    ),
    (
        "Whether the images help a task must be measured on real images of that task: the figures"
        " below are distances, not usefulness."
    ),
)


def model_card(manifest: Manifest) -> str:
    """Write the card.

    Args:
        manifest: The model folder's manifest.

    Returns:
        The card as Markdown.
    """
    grid, unit = manifest.grid, manifest.intensity.unit
    spacing = (
        "whatever its size in mm"
        if grid.pixel_spacing is None
        else f"{grid.pixel_spacing[0]:g} x {grid.pixel_spacing[1]:g} mm a pixel"
    )
    between = (
        f", {grid.slices} neighbouring slices {grid.slice_spacing:g} mm apart"
        if grid.slices > 1
        else ""
    )
    labels = [
        (str(x.value), x.name, ", ".join(map(str, x.aliases)), x.snomed or "")
        for x in manifest.labels.labels
    ]
    files = [
        (name, f.precision, f"{f.bytes / 1e6:.1f} MB", f"`{f.sha256}`")
        for name, f in manifest.files.items()
    ]
    organs = organ_rows(manifest)
    return (
        "\n\n".join(
            [
                f"# {manifest.name}",
                "Written by mask2ct from `manifest.json`, which holds the figures in full.",
                f"## Intended use\n\n{INTENDED}",
                f"## License\n\n{manifest.license or UNLICENSED}",
                f"## Labels\n\n{_table(('value', 'structure', 'also', 'SNOMED CT'), labels)}",
                (
                    f"A mask with other values is refused. Synthesized: {manifest.intensity.low} to"
                    f" {manifest.intensity.high} {unit}, on a canvas of {grid.canvas[0]} x"
                    f" {grid.canvas[1]}, {spacing}{between}."
                ),
                "## Data and training\n\n" + _list(training_lines(manifest)),
                (
                    f"## Metrics\n\nOn held-out patients, in {unit}, synthetic beside"
                    f" true.\n\n{_table(ORGAN_HEAD, organs)}"
                    if organs
                    else ""
                ),
                f"## Verdict\n\n{_verdict(manifest)}",
                f"## Scorecard\n\n{_scorecard(manifest)}",
                (
                    f"## Parity of the files\n\nDifferences from the network in {unit}, measured at"
                    " export in each engine. Slices/s are those of the machine that exported."
                    f"\n\n{_table(PARITY_HEAD, parity_rows(manifest))}"
                    f"\n\n{_list(export_lines(manifest))}"
                ),
                f"## Files\n\n{_table(('file', 'precision', 'size', 'SHA-256'), files)}",
                "## Limits\n\n" + _list(LIMITS),
            ]
        ).replace("\n\n\n\n", "\n\n")
        + "\n"
    )


def _verdict(manifest: Manifest) -> str:
    """What the training's figures say, beside a control and real patients."""
    verdict = manifest.training.get("verdict")
    if verdict is None:
        return "Not assessed: the training states no verdict."
    lines = _list([finding["text"] for finding in verdict["findings"]])
    text = f"**{verdict['verdict']}**\n\n{lines}"
    quality = manifest.training.get("quality")
    if quality is None:
        return text
    head = ("", *(title for key, title in COLUMNS.items() if key in quality))
    figures = _table(head, quality_rows(quality, manifest.intensity.unit))
    return f"{text}\n\n{LEGEND}\n\n{figures}"


def _scorecard(manifest: Manifest) -> str:
    """The seven Cs (Commun Eng 2025, 10.1038/s44172-025-00450-1), as far as they are measured."""
    quality = manifest.training.get("quality") or {}
    synthetic, memory = quality.get("synthetic"), quality.get("memory")
    real = quality.get("real")
    unknown = "not measured"

    def axial(column: Any) -> str:
        value = column and column["frechet"]["axial"]
        return unknown if value is None else f"{value:.3g}"

    organs = [organ for organ in (synthetic or {}).get("organs", {}).values() if organ]
    clipped = f"{max(o['clipped'] for o in organs):.2g} %" if organs else unknown
    rows = [
        (
            "congruence",
            "Fréchet distance, axial (real-vs-real)",
            f"{axial(synthetic)} ({axial(real)})",
        ),
        (
            "coverage",
            "gradient W1 (real-vs-real); the spread of styles is under Metrics",
            f"{synthetic['gradient']:.3g} ({real['gradient']:.3g})"
            if synthetic and real
            else unknown,
        ),
        ("constraint", "most voxels of a label at the end of the range", clipped),
        (
            "completeness",
            "labels of the table that were measured",
            f"{len(organs)} of {len(manifest.labels) - 1}" if synthetic else unknown,
        ),
        (
            "compliance",
            "copied training slices; distance to training over held-out slices",
            f"{memory['copies']} of {memory['slices']}; {memory['ratio']:.2f}"
            if memory
            else unknown,
        ),
        ("comprehension", "this card, the manifest and the run's report.html", "given"),
        (
            "consistency",
            "outline step in pixels (true)",
            f"{synthetic['outline_step']:.3g} ({synthetic['outline_step_true']:.3g})"
            if synthetic and synthetic["outline_step"] is not None
            else unknown,
        ),
    ]
    return _table(("", "measured by", "value"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in (head, ["---"] * len(head), *rows)
    )


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
