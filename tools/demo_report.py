"""The demo's report, by which a person assesses the result."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.core.atomic_files import atomic_path, write_json
from runtime.core.console import duration
from runtime.core.labels import MM_WHS
from runtime.core.manifest import Manifest
from runtime.engines.description import PARITY_HEAD, parity_rows
from runtime.io.readers.volume import read_volume
from runtime.viewer.page import Viewer, page
from train.evaluate import read_cases, read_reference
from train.metrics.distribution import Sample
from train.metrics.quality import quality
from train.metrics.scores import evaluate, organ_names
from train.reporting.html import curves, organ_table, picture, planes, read_metrics, table
from train.reporting.run_report import quality_section
from train.verdict import summary


def write_report(
    out: Path, seconds: Mapping[str, float], machine: Mapping[str, Any], case_count: int
) -> None:
    """Measure the synthetic CTs against the true ones, and write report.html and metrics.json.

    Args:
        out: The demo's folder, with synthetic, truth and masks of the unseen patients.
        seconds: Wall seconds by stage.
        machine: Facts of the machine.
        case_count: How many cases the report has pictures of.
    """
    names = organ_names(MM_WHS)
    synthetic, truth, masks = read_cases(out / "synthetic", out / "truth", out / "masks", MM_WHS)
    metrics = evaluate(synthetic, truth, masks, names)
    real, generated, train = (
        [Sample(*case) for case in zip(images, maps, strict=True)]
        for images, maps in (
            (truth, masks),
            (synthetic, masks),
            read_reference(out / "data", MM_WHS),
        )
    )
    metrics["quality"] = quality(generated, real, train, names)
    write_json(out / "metrics.json", metrics)
    cases = [path.name.removesuffix(".nii.gz") for path in sorted((out / "masks").glob("*.nii.gz"))]
    manifest = Manifest.load(out / "model")
    synthesis = json.loads((out / "synthesis.json").read_text(encoding="utf-8"))

    viewer, pictures = Viewer(dict(enumerate(names, 1))), ""
    for n, case in enumerate(cases[:case_count]):
        geometry = read_volume(out / "masks" / f"{case}.nii.gz").geometry
        for title, images in (("synthetic", synthetic), ("true", truth)):
            viewer.add(case, title, images[n], geometry, masks[n])
        drawn = planes(masks[n], synthetic[n], truth[n], geometry.spacing, len(names) + 1)
        pictures += f"<p>{html.escape(case)}</p>" + picture(
            drawn, f"{case}: condition, synthetic, true"
        )
        if n == 0:
            with atomic_path(out / "mask-to-ct.png") as part:
                drawn.savefig(part, format="png", dpi=80)
    page(
        out / "report.html",
        "mask2ct: synthetic CT from masks no network has seen",
        f"{len(cases)} unseen phantom patients, synthesized from their heart labels alone."
        " Synthetic images, not for diagnosis.",
        [
            ("Look into them", viewer.html()),
            (
                "Condition | synthetic | true",
                "<p class=note>Window -700 … 700 HU. The network is given the left column only.</p>"
                + pictures,
            ),
            ("Organs", _organs(metrics)),
            ("Beside the class table and real patients", quality_section(metrics)),
            ("Verdict on the training", _verdict(manifest)),
            (
                "Training",
                picture(curves(read_metrics(out / "train" / "metrics.jsonl")), "training curves"),
            ),
            ("Parity of the export", _parity(manifest)),
            ("Seconds", _seconds(seconds, synthesis)),
            (
                "Machine",
                table(
                    ("", ""),
                    [(k, json.dumps(v) if isinstance(v, dict) else v) for k, v in machine.items()],
                ),
            ),
        ],
    )


def _verdict(manifest: Manifest) -> str:
    """The verdict on the training as HTML."""
    verdict = manifest.training.get("verdict")
    return f"<p>{html.escape(summary(verdict))}</p>" if verdict else "<p>None.</p>"


def _organs(metrics: Mapping[str, Any]) -> str:
    """The organs' figures as HTML."""
    body = metrics["body"]
    lead = (
        f"<p>Mean absolute error inside the body {body['mae']:.0f} HU, {body['mae_ratio']:.2f} of"
        " the error of an image that gives each label, and the rest of the body, its mean"
        f" ({body['mae_label_mean']:.0f} HU). The demo's limit is 0.5.</p>"
    )
    return lead + organ_table(metrics["organs"], "HU")


def _parity(manifest: Manifest) -> str:
    """The parity report as HTML."""
    note = (
        "<p class=note>The exported files against the PyTorch network, in HU, in every installed"
        " engine: the mean difference of all voxels, the value that 99.9 % stay below, the largest;"
        " the mean in the body; the largest shift of an organ's median; what SSIM is short of 1."
        " Export refuses a file beyond its limits.</p>"
    )
    return note + table(PARITY_HEAD, parity_rows(manifest))


def _seconds(seconds: Mapping[str, float], synthesis: Mapping[str, Any]) -> str:
    """Wall time by stage, and the throughput, as HTML."""
    slices = sum(case["slices"] for case in synthesis["cases"])
    inference_seconds = sum(case["seconds"]["synthesize"] for case in synthesis["cases"])
    rows = [(name, duration(s)) for name, s in seconds.items()] + [
        ("together", duration(sum(seconds.values())))
    ]
    overall_rate = slices / synthesis["seconds"]
    speed = (
        f"<p>{slices} slices were synthesized at {slices / inference_seconds:.0f} slices/s"
        f" ({overall_rate:.0f} slices/s with files in and out), "
    )
    return (
        table(("stage", "wall time"), rows)
        + speed
        + f"backend {html.escape(synthesis['backend'])}.</p>"
    )
