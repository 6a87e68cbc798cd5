"""MODEL_CARD.md: what a hospital reads before it uses a model, written from the manifest.

Mitchell et al., "Model Cards for Model Reporting", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.core.manifest import Manifest
from runtime.engines.description import (
    ORGAN_HEAD,
    PARITY_HEAD,
    export_lines,
    organ_rows,
    parity_rows,
    training_lines,
)

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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in (head, ["---"] * len(head), *rows)
    )


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
