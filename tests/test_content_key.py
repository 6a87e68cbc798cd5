"""The resume key: every option is part of it until it says that no byte depends on it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from samples import blobs, synth, write_mask

from runtime import Synthesizer, UsageError
from runtime.batch.plan import Plan
from runtime.batch.runner import CaseResult, make
from runtime.core.deformation import DeformationParams
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.io.case_finding import find_cases
from runtime.io.cases import Case, ReadOptions
from runtime.io.writers.registry import FormatOptions

# Another value of every option, with whether the bytes of variant 1 depend on it.
OTHER_VALUES: dict[str, tuple[Any, bool]] = {
    "output": (Path("elsewhere"), False),
    "format": ("mha", True),
    "options": (FormatOptions(enhanced=True), True),
    "variants": (7, False),
    "ranges": (DeformationParams(rotate=1.0), True),
    "seed": (1, True),
    "labels": ({0: 0, None: 3}, True),
    "resume": (True, False),
    "replace": (False, False),
    "shared": (True, False),
}


@dataclass(frozen=True)
class SharperPlan(Plan):
    """A plan of a later version, which has learnt one more option."""

    sharpness: Any = 0.0


@dataclass(frozen=True)
class TurnedCase(Case):
    """A case of a later version."""

    turns: int = 0


def run(plan: Plan, cases: list[Case]) -> list[CaseResult]:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        return list(make(opened, cases, plan))


def one_case(folder: Path) -> list[Case]:
    return find_cases([write_mask(folder / "a.nii.gz", blobs((8, 24, 24)))])


@pytest.mark.parametrize("sharpness", [0.5, Path("kernel"), (1, 2), {"edge": 2.0}])
def test_new_option_changes_resume_key(sharpness: object, tmp_path: Path) -> None:
    cases, plan = one_case(tmp_path), SharperPlan(tmp_path / "out")
    run(plan, cases)
    resumed = run(replace(plan, resume=True), cases)
    changed = run(replace(plan, resume=True, sharpness=sharpness), cases)
    again = run(replace(plan, resume=True, sharpness=sharpness), cases)
    assert [r.skipped for r in (*resumed, *changed, *again)] == [True, False, True]


def test_new_case_field_changes_resume_key(tmp_path: Path) -> None:
    (case,), plan = one_case(tmp_path), Plan(tmp_path / "out", resume=True)
    facts = {f.name: getattr(case, f.name) for f in fields(case)}
    runs = [run(plan, [TurnedCase(**facts, turns=turns)]) for turns in (0, 0, 1, 1)]
    assert [r.skipped for (r,) in runs] == [False, True, False, True]


@pytest.mark.parametrize("name", [f.name for f in fields(Plan)])
def test_each_option_is_keyed_or_exempt(name: str) -> None:
    plan = Plan(Path("out"), variants=3)
    value, matters = OTHER_VALUES[name]
    changed = replace(plan, **{name: value})
    assert (changed.content_key(1) != plan.content_key(1)) == matters


@pytest.mark.parametrize("options", [ReadOptions, FormatOptions, DeformationParams])
def test_resume_key_contains_every_option(options: type) -> None:
    """They are in the key as their text has them."""
    assert all(f.repr for f in fields(options))


def test_ranges_leave_undeformed_results_alone() -> None:
    plan = Plan(Path("out"), variants=3)
    bent = replace(plan, ranges=DeformationParams(deform=3.0))
    assert [plan.content_key(n) == bent.content_key(n) for n in (None, 0, 1)] == [True, True, False]


@pytest.mark.parametrize("variants", [0, -1, 100_001, 10**12])
def test_variants_out_of_range_are_refused(variants: int) -> None:
    with pytest.raises(UsageError, match="1 to 100,000"):
        Plan(Path("out"), variants=variants)
    assert len(Plan(Path("out"), variants=100_000).variant_ids) == 100_000


def test_the_command_refuses_endless_variants(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = write_mask(tmp_path / "a.nii.gz")
    assert synth(fake_model, tmp_path / "out", mask, "--variants", str(10**12)) == 2
    told = capsys.readouterr().err
    assert "1,000,000,000,000 variants" in told and "--seed" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()
