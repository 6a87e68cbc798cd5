"""Contenders measured side by side: each in a process of its own, taking turns within every round,
compared round by round.

A machine whose speed drifts (shared cores, heat) slows all contenders of a round alike, so that
their ratios stand still while their rates move. A ratio is given with the Hodges-Lehmann estimate
and Wilcoxon's signed-rank interval of its logarithm over the rounds (Hollander, Wolfe & Chicken,
Nonparametric Statistical Methods, 3.1 to 3.3): no normal distribution is assumed, and one stolen
round moves little. An interval that holds 1 is no difference.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement, count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import numpy as np

from benchmarks.harness.record import peak_rss
from runtime.core.console import Progress
from runtime.core.errors import Mask2CTError, MissingComponent

LEAST_ROUNDS = 7
LAUNCHES = 2
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Contender:
    """`make`: "module:function" of what sets it up in its own process, called with `options` (JSON
    values); returns a `Ready`.

    `tolerance`: how far its output may be from the first contender's, mean absolute difference;
    None: it has none to compare. `cost`: what one unit of its work takes of each limit
    (benchmarks/harness/roofline.py): multiply-accumulates at a precision, bytes.
    """

    name: str
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    cost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A contender set up: `run()` does one round's work and returns how many units (slices, bytes,
    steps) that was.

    `output()` gives what it computes, to be compared before anything is timed; `facts`: what a
    reader should know of it, also what only its runs tell. `folder`: where it writes; a round finds
    it empty, and the disk idle, and is not timed for either.
    """

    run: Callable[[], float]
    output: Callable[[], np.ndarray] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Measured:
    """What became of one contender: units/s in each round, peak resident bytes, what it says of
    itself, or why it is not there.

    `error`: mean absolute difference of its output from the first contender's, where they were
    compared.
    """

    rates: tuple[float, ...] = ()
    peak_rss: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    absent: str | None = None
    error: float | None = None


class ContenderFailed(Mask2CTError):
    """A contender's process ended, or its output is not the reference's."""

    exit_code = 1


def measure(
    contenders: Sequence[Contender], rounds: int, *, launches: int = LAUNCHES, quiet: bool = False
) -> dict[str, Measured]:
    """Set every contender up, compare their outputs with the first one's, then time them; all of it
    `launches` times, for a part of the rounds each.

    Processes anew differ by more than rounds within one (where memory came to lie, which kernels
    were chosen): one launch's interval would be too narrow to hold the next run's ratio. A
    contender that raises `MissingComponent` or `ImportError` while it is set up is given as absent,
    with its reason. One round of warm-up a launch is not counted; who comes first moves on from
    round to round. Raises `ContenderFailed`.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(
            f"{rounds} rounds say nothing of the noise (expected {LEAST_ROUNDS} or more)"
        )
    progress = Progress("rounds", rounds + launches, quiet=quiet)
    counted = count(1)
    done = [
        _launch(contenders, len(range(n, rounds, launches)), lambda: progress.update(next(counted)))
        for n in range(launches)
    ]
    progress.close()
    return {c.name: _joined([one[c.name] for one in done]) for c in contenders}


def _launch(
    contenders: Sequence[Contender], rounds: int, advance: Callable[[], None]
) -> dict[str, Measured]:
    with ExitStack() as stack:
        found = {c.name: stack.enter_context(_process(c)) for c in contenders}
        absent = {name: child["absent"] for name, (_, child) in found.items() if "absent" in child}
        present = {name: child for name, (child, _) in found.items() if name not in absent}
        outputs = {name: answer.get("output") for name, (_, answer) in found.items()}
        errors = _compare([c for c in contenders if c.name in present], outputs)
        rates: dict[str, list[float]] = {name: [] for name in present}
        last: dict[str, dict[str, Any]] = {}
        order = list(present)
        for n in range(rounds + 1):
            for name in order[n % len(order) :] + order[: n % len(order)]:
                done = _ask(present[name], name)
                last[name] = done
                if n:
                    rates[name].append(done["units"] / done["seconds"])
            advance()
    return {
        c.name: (
            Measured(absent=absent[c.name])
            if c.name in absent
            else Measured(
                tuple(rates[c.name]),
                last[c.name]["peak_rss"],
                last[c.name]["facts"],
                error=errors.get(c.name),
            )
        )
        for c in contenders
    }


def _joined(launches: Sequence[Measured]) -> Measured:
    """The rounds of all launches, the highest peak, the last one's facts."""
    rates = tuple(rate for one in launches for rate in one.rates)
    return replace(launches[-1], rates=rates, peak_rss=max(one.peak_rss for one in launches))


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, with the interval that holds the true median at CONFIDENCE (shared
    by all ratios of a run).
    """

    value: float
    least: float
    most: float

    @property
    def differs(self) -> bool:
        return not self.least <= 1 <= self.most

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.least:.2f} … {self.most:.2f})" + (
            "" if self.differs else ", no difference"
        )


def ratio(ours: Sequence[float], theirs: Sequence[float], of: int = 1) -> Ratio:
    """Ours / theirs, round by round; `of`: how many ratios the run gives, so that all intervals
    hold together (Bonferroni).
    """
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    walsh = sorted((a + b) / 2 for a, b in combinations_with_replacement(logs, 2))
    tail = _signed_rank_tail(len(logs), (1 - CONFIDENCE) / 2 / of)
    middle = float(np.median(walsh))
    return Ratio(math.exp(middle), math.exp(walsh[tail]), math.exp(walsh[-1 - tail]))


def _signed_rank_tail(n: int, alpha: float) -> int:
    """How many of the smallest Walsh averages lie outside the interval: the largest c with P(T+ <=
    c - 1) <= alpha, 0 if none.

    With few rounds even the whole range is less sure than asked; it is what there is.
    """
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1
    for rank in range(1, n + 1):  # the distribution of the sum of the ranks of positive signs
        counts[rank:] = counts[rank:] + counts[: len(counts) - rank].copy()
    return int(np.searchsorted(np.cumsum(counts) / 2.0**n, alpha, side="right"))


@contextmanager
def _process(contender: Contender) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The contender's process, and the line it says when it is set up."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        contender.make,
        json.dumps(dict(contender.options)),
    ]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child, _answer(child, contender.name)
    finally:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.wait()
        child.stdout.close()


def _ask(child: subprocess.Popen[str], name: str) -> dict[str, Any]:
    assert child.stdin is not None
    child.stdin.write("run\n")
    child.stdin.flush()
    return _answer(child, name)


def _answer(child: subprocess.Popen[str], name: str) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise ContenderFailed(
            f"the contender {name!r} ended (exit {child.wait()})",
            expected="a contender that runs",
            remedy="see what it printed above",
        )
    answer: dict[str, Any] = json.loads(line)
    return answer


def _compare(
    contenders: Sequence[Contender], outputs: Mapping[str, str | None]
) -> dict[str, float]:
    """How far each output is from the first contender's. Raises `ContenderFailed`."""
    errors = {}
    for contender in contenders:
        if contender.tolerance is None:
            continue
        reference, output = (
            np.load(str(outputs[name])).astype(np.float64)
            for name in (contenders[0].name, contender.name)
        )
        far = (
            math.inf
            if output.shape != reference.shape
            else float(np.abs(output - reference).mean())
        )
        if not far <= contender.tolerance:
            raise ContenderFailed(
                f"{contender.name!r} computes something else than {contenders[0].name!r}: {far:.4g}"
                " on average",
                expected=f"at most {contender.tolerance:g}",
                remedy="a figure for a wrong result is no figure: mend the contender",
            )
        errors[contender.name] = far
    return errors


def _child(make: str, options: Mapping[str, Any]) -> int:
    """The contender's own process: sets up, says so, and does a round whenever a line comes in.

    Standard output is ours alone.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints goes to standard error
    module, function = make.split(":")
    try:
        ready: Ready = getattr(importlib.import_module(module), function)(**options)
    except (MissingComponent, ImportError) as exc:
        answers.write(json.dumps({"absent": str(exc).splitlines()[0]}) + "\n")
        return 0
    said: dict[str, Any] = {}
    if ready.output is not None:
        handle, path = tempfile.mkstemp(suffix=".npy")
        os.close(handle)
        np.save(path, ready.output())
        said["output"] = path
    answers.write(json.dumps(said) + "\n")
    for _ in sys.stdin:
        if ready.folder is not None:
            shutil.rmtree(ready.folder, ignore_errors=True)
            ready.folder.mkdir()
        # who waits for the disk, as we do, would wait for what the one before left unwritten, too
        os.sync()
        started = time.perf_counter()
        units = ready.run()
        seconds = time.perf_counter() - started
        answers.write(
            json.dumps(
                {
                    "units": units,
                    "seconds": seconds,
                    "peak_rss": peak_rss(),
                    "facts": dict(ready.facts),
                }
            )
            + "\n"
        )
    if "output" in said:
        Path(said["output"]).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], json.loads(sys.argv[2])))
