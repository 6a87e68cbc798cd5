"""The statistics that benchmarks rest on, and the processes that contenders run in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import history
from benchmarks.harness.paired import Contender, ContenderFailed, Measured, Ready, measure, ratio
from runtime.core.errors import MissingComponent, UsageError

ROUNDS = 9


def counting(units: int, value: float = 0.0) -> Ready:
    return Ready(lambda: units, lambda: np.full(4, value), {"doubled": 2 * units})


def missing() -> Ready:
    raise MissingComponent("no such engine", expected="an engine", remedy="install it")


def dying() -> Ready:
    return Ready(lambda: exit(3))


def here(name: str, function: str, tolerance: float | None = None, **options: Any) -> Contender:
    return Contender(name, f"tests.test_paired:{function}", options, tolerance)


def test_contenders_run_in_own_process() -> None:
    """Each contender runs in a process of its own, and one that is absent says why."""
    found = measure(
        [here("a", "counting", units=3), here("b", "missing"), here("c", "counting", units=5)],
        ROUNDS,
        quiet=True,
    )
    assert list(found) == ["a", "b", "c"] and "no such engine" in str(found["b"].absent)
    assert (
        found["c"].facts == {"doubled": 10}
        and len(found["a"].rates) == ROUNDS
        and min(found["a"].rates) > 0
    )
    assert found["a"].peak_rss > 1e6


def noted(file: str) -> Ready:
    def run() -> float:
        with open(file, "a") as handle:
            handle.write(f"{os.getpid()}\n")
        return 1.0

    return Ready(run)


def test_each_launch_warms_up(tmp_path: Path) -> None:
    """Every launch is a new process with its own warm-up."""
    found = measure(
        [here("a", "noted", file=str(tmp_path / "pids"))], ROUNDS, launches=2, quiet=True
    )
    pids = (tmp_path / "pids").read_text().split()
    assert len(found["a"].rates) == ROUNDS and len(pids) == ROUNDS + 2
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [6, 5]


def leaving(folder: str) -> Ready:
    def run() -> float:
        left = Path(folder, "left")
        assert not left.exists()
        left.write_text("of this round")
        return 1.0

    return Ready(run, folder=Path(folder))


def test_round_starts_with_empty_folder(tmp_path: Path) -> None:
    """Every round starts with an empty output folder."""
    (tmp_path / "out").mkdir()
    found = measure([here("a", "leaving", folder=str(tmp_path / "out"))], ROUNDS, quiet=True)
    assert len(found["a"].rates) == ROUNDS and (tmp_path / "out" / "left").exists()


def test_wrong_result_is_not_timed() -> None:
    """A contender that computes something else is not timed."""
    with pytest.raises(ContenderFailed, match="'b' computes something else than 'a'"):
        measure(
            [here("a", "counting", units=1), here("b", "counting", 0.5, units=1, value=0.6)],
            ROUNDS,
            quiet=True,
        )
    measure(
        [here("a", "counting", units=1), here("b", "counting", 0.5, units=1, value=0.4)],
        ROUNDS,
        quiet=True,
    )


def test_dead_contender_is_named() -> None:
    """A contender that dies is an error, which names it."""
    with pytest.raises(ContenderFailed, match="'gone' ended"):
        measure([here("a", "counting", units=1), here("gone", "dying")], ROUNDS, quiet=True)


def noisy(
    rng: np.random.Generator, speed: float, drift: np.ndarray, sigma: float = 0.05
) -> list[float]:
    """Rates of one contender: the machine's drift is shared, stolen time hits anyone now and
    then.
    """
    stolen = np.where(rng.random(len(drift)) < 0.08, rng.uniform(0.4, 0.9, len(drift)), 1.0)
    return list(speed * drift * stolen * np.exp(rng.normal(0, sigma, len(drift))))


def test_confidence_interval_coverage() -> None:
    """The interval holds the true ratio as often as it says."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        drift = np.exp(np.cumsum(rng.normal(0, 0.2, ROUNDS)))
        found = ratio(noisy(rng, 3.0, drift), noisy(rng, 2.0, drift))
        inside += found.least <= 1.5 <= found.most
    assert inside / 400 >= 0.93


def test_interval_with_one_means_equal() -> None:
    """A ratio whose interval holds 1 is not a difference."""
    assert "no difference" in str(ratio([1, 2, 3, 1, 2, 3, 2], [2, 1, 3, 2, 1, 3, 2]))
    found = ratio([2.0, 2.1, 1.9, 2.2, 2.0, 2.1, 1.8], [1.0] * 7)
    assert found.differs and 1.8 <= found.least <= found.value <= found.most <= 2.2


def record(rng: np.random.Generator, speed: float, commit: str = "abc1234") -> dict[str, Any]:
    drift = np.exp(np.cumsum(rng.normal(0, 0.1, ROUNDS)))
    names = {"ours": speed, "torch": 1.0, "serial": 0.5}
    made = history.make_record(
        "stream",
        {"quick": True},
        "slices/s",
        {n: Measured(tuple(noisy(rng, s, drift)), 1) for n, s in names.items()},
    )
    made["machine"]["commit"] = commit
    return made


def test_planted_slowdown_is_detected() -> None:
    """A planted slowdown is reported, and where nothing changed, none is."""
    rng = np.random.default_rng(1)
    slowed = sum(bool(history.regressions(record(rng, 3.0), record(rng, 2.0))) for _ in range(100))
    same = sum(bool(history.regressions(record(rng, 3.0), record(rng, 3.0))) for _ in range(100))
    assert slowed >= 90 and same <= 10


def test_records_by_commit_machine_options(tmp_path: Path) -> None:
    """Records are kept, and read again by commit, machine and options."""
    rng, file = np.random.default_rng(2), tmp_path / "results" / "history.jsonl"
    first, second, other = (
        record(rng, 3.0),
        record(rng, 3.0, "def5678"),
        {**record(rng, 3.0), "options": {"quick": False}},
    )
    history.append([first], file)
    history.append([second, other], file)
    kept = history.load(file)
    assert kept == json.loads(json.dumps([first, second, other]))
    new = record(rng, 3.0)
    assert (
        history.before(new, kept, "last") == kept[1]
        and history.before(new, kept, "abc1234") == kept[0]
    )
    assert history.before(new, kept, "0000000") is None
    new["machine"]["cores"] = 64
    assert history.before(new, kept, "last") is None
    file.write_text("{}\nnot json\n")
    with pytest.raises(UsageError, match="line 2"):
        history.load(file)


def test_peak_memory_of_contender() -> None:
    """The peak memory is that of the contender, not that of the process that started it."""
    ballast = np.ones(60_000_000)  # 480 MB here
    found = measure([here("a", "counting", units=3)], ROUNDS, quiet=True)
    assert 1e6 < found["a"].peak_rss < ballast.nbytes
