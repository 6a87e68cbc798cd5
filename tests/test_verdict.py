"""The verdict on a training: what broke is found, what is fine is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_distribution import cohort

from export.model_card import model_card
from export.verdict import check_verdict
from runtime.core.manifest import Manifest
from train.metrics.distribution import Sample
from train.metrics.quality import quality
from train.metrics.quality_table import rows
from train.metrics.scores import HU
from train.run import refuse_broken
from train.verdict import (
    BROKEN,
    GOOD,
    LEAST_STEPS,
    NOT_ASSESSED,
    WEAK,
    BrokenModel,
    WeakModel,
    assess,
    summary,
)


def measured(defect: Callable[[np.ndarray, np.ndarray], None]) -> dict:
    """The quality of six real patients, with a defect planted in each."""
    synthetic = cohort(40, 6)
    for image, labels, _ in synthetic:
        defect(image, labels == 1)
    return quality(synthetic, cohort(20, 6), cohort(0, 6), ["heart"], planes=["axial"])


def nothing(image: np.ndarray, heart: np.ndarray) -> None:
    pass


def speckle(image: np.ndarray, heart: np.ndarray) -> None:
    """Black and white noise in one label, its median untouched: FACTS of a training that broke."""
    noise = np.random.default_rng(0).choice([-60, 60], heart.sum())
    image[heart] += noise.astype(np.int16)


def stuck(image: np.ndarray, heart: np.ndarray) -> None:
    """5 % of the label at the upper end of the range."""
    share = np.random.default_rng(0).random(heart.sum()) < 0.05
    image[heart] = np.where(share, HU.high - 1, image[heart])


@pytest.fixture(scope="module")
def sound() -> dict:
    return measured(nothing)


def test_other_patients_are_good(sound: dict) -> None:
    """Real patients in the place of synthetic ones pass, but for a tie with the table."""
    verdict = assess(sound, LEAST_STEPS)
    texts = [f["text"] for f in verdict["findings"] if "class table" not in f["text"]]
    assert texts == [] and verdict["verdict"] in (GOOD, WEAK)
    assert [row[0] for row in rows(sound)][:3] == [
        "Fréchet, axial",
        "kernel distance, axial",
        "gradient W1, HU",
    ]
    json.dumps(sound, allow_nan=False)


@pytest.mark.parametrize(
    ("defect", "words"), [(speckle, "heart: its noise"), (stuck, "heart: voxels at the end")]
)
def test_planted_defect_is_broken(defect: Callable[..., None], words: str) -> None:
    verdict = assess(measured(defect), LEAST_STEPS)
    assert verdict["verdict"] == BROKEN
    first = verdict["findings"][0]
    assert first["level"] == BROKEN and first["label"] == "heart"
    assert any(f["text"].startswith(words) for f in verdict["findings"])


def test_copied_patients_are_broken(sound: dict) -> None:
    train = cohort(0, 6)
    copies = [Sample(s.image.copy(), *s[1:]) for s in train]
    result = quality(copies, cohort(20, 6), train, ["heart"], planes=["axial"])
    verdict = assess(result, LEAST_STEPS)
    assert verdict["verdict"] == BROKEN and "slices copied" in summary(verdict)


def test_short_training_is_not_assessed(sound: dict) -> None:
    """A trial of five steps is neither good nor broken, and says so."""
    for quality_ in (sound, None):
        verdict = assess(quality_, 5)
        assert verdict["verdict"] == NOT_ASSESSED and "5 steps" in summary(verdict)
    check_verdict(run_with(assess(None, 5)))


def run_with(verdict: dict | None) -> SimpleNamespace:
    return SimpleNamespace(data={} if verdict is None else {"verdict": verdict}, folder=Path("run"))


def of_level(level: str) -> dict:
    finding = {"level": level, "text": "heart: its noise is 3 (limit 2)", "label": "heart"}
    return {"verdict": level, "steps": 400, "findings": [finding]}


def test_broken_training_exits_with_one() -> None:
    with pytest.raises(BrokenModel) as caught:
        refuse_broken(of_level(BROKEN), Path("run"))
    assert caught.value.exit_code == 1 and "worst.png" in caught.value.remedy
    refuse_broken(of_level(WEAK), Path("run"))


def test_weak_export_needs_acceptance() -> None:
    with pytest.raises(WeakModel) as caught:
        check_verdict(run_with(of_level(WEAK)))
    assert caught.value.exit_code == 1 and "--accept-weak" in caught.value.remedy
    check_verdict(run_with(of_level(WEAK)), accept_weak=True)
    with pytest.raises(BrokenModel):
        check_verdict(run_with(of_level(BROKEN)), accept_weak=True)
    check_verdict(run_with(None))  # of an earlier version


def test_card_holds_verdict_and_scorecard(sound: dict, root: Path) -> None:
    """The sentences, the three columns, and the seven Cs with their figures."""
    manifest = Manifest.load(root / "tests" / "files_of_0.1" / "model")
    assert "Not assessed" in model_card(manifest) and "not measured" in model_card(manifest)
    training = {**manifest.training, "quality": sound, "verdict": of_level(WEAK)}
    card = model_card(replace(manifest, training=training))
    assert "**weak**" in card and "heart: its noise is 3 (limit 2)" in card
    assert "| class table | real-vs-real |" in card and "| consistency |" in card
    assert f"0 of {sound['memory']['slices']}" in card
