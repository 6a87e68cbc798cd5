"""Measure contenders side by side: in processes of their own, in turn within every round.

A machine whose speed drifts (shared cores, heat) slows all contenders of a round alike: their
ratios stand still while their rates move. A ratio is given with the Hodges-Lehmann estimate and
Wilcoxon's signed-rank interval of its logarithm over the rounds (Hollander, Wolfe & Chicken,
Nonparametric Statistical Methods, 3.1 to 3.3). It assumes no normal distribution, and one stolen
round moves it little. An interval that holds 1 is no difference.
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
    """What is measured.

    Attributes:
        name: Its name in tables.
        make: "module:function" that sets it up in its own process and returns a `Ready`.
        options: Arguments of the function, JSON values.
        tolerance: How far its output may be from the first contender's, as mean absolute
            difference.
            None: it has no output to compare.
        cost: What one unit of its work takes of each limit (benchmarks/harness/roofline.py):
            multiply-accumulates at a precision, bytes.
    """

    name: str
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    cost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A contender that is set up.

    Attributes:
        run: Does one round's work and returns how many units (slices, bytes, steps) that was.
        output: Returns what it computes, to be compared before the timing starts.
        facts: What a reader should know of it; runs may add to them.
        folder: Where it writes. A round finds it empty and the disk idle; neither is timed.
    """

    run: Callable[[], float]
    output: Callable[[], np.ndarray] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Measured:
    """The result of one contender.

    Attributes:
        rates: Units/s in each round.
        peak_rss: Peak resident memory in bytes.
        facts: What it says of itself.
        absent: Why it could not run, or None.
        error: Mean absolute difference of its output from the first contender's, if compared.
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
    """Set up every contender, compare their outputs with the first one's, then time them.

    All of this happens `launches` times, for a part of the rounds each. New processes differ more
    than the rounds within one (where memory lies, which kernels were chosen): the interval of one
    launch would be too narrow to hold the next run's ratio. A launch starts with a round of warm-up
    that does not count. The contender that comes first changes from round to round. One that raises
    `MissingComponent` or `ImportError` while it is set up is absent, with its reason.

    Args:
        contenders: The contenders; the first is the reference.
        rounds: Rounds of all launches together.
        launches: How often the processes start anew.
        quiet: No progress bar.

    Returns:
        The results by name.

    Raises:
        ContenderFailed: A process ended, or an output differs too much.
        ValueError: Too few rounds.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"{rounds} rounds do not show the noise (expected {LEAST_ROUNDS} or more)")
    progress = Progress("rounds", rounds + launches, quiet=quiet)
    steps = count(1)
    results = [
        _launch(contenders, len(range(n, rounds, launches)), lambda: progress.update(next(steps)))
        for n in range(launches)
    ]
    progress.close()
    return {c.name: _joined([one[c.name] for one in results]) for c in contenders}


def _launch(
    contenders: Sequence[Contender], rounds: int, advance: Callable[[], None]
) -> dict[str, Measured]:
    """Set up, compare and time all contenders in new processes."""
    with ExitStack() as stack:
        children = {c.name: stack.enter_context(_process(c)) for c in contenders}
        absent = {
            name: child["absent"] for name, (_, child) in children.items() if "absent" in child
        }
        present = {name: child for name, (child, _) in children.items() if name not in absent}
        outputs = {name: answer.get("output") for name, (_, answer) in children.items()}
        errors = _compare([c for c in contenders if c.name in present], outputs)
        rates: dict[str, list[float]] = {name: [] for name in present}
        last: dict[str, dict[str, Any]] = {}
        order = list(present)
        for n in range(rounds + 1):
            for name in order[n % len(order) :] + order[: n % len(order)]:
                answer = _ask(present[name], name)
                last[name] = answer
                if n:
                    rates[name].append(answer["units"] / answer["seconds"])
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
    """How many times as fast, with its interval.

    Attributes:
        value: The estimate.
        least: The lower end of the interval that holds the true median at CONFIDENCE, which all
            ratios of a run share.
        most: Its upper end.
    """

    value: float
    least: float
    most: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1."""
        return not self.least <= 1 <= self.most

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.least:.2f} … {self.most:.2f})" + (
            "" if self.differs else ", no difference"
        )


def ratio(rates: Sequence[float], baseline_rates: Sequence[float], of: int = 1) -> Ratio:
    """The ratio of two contenders, round by round.

    Args:
        rates: Our rates.
        baseline_rates: The other contender's rates.
        of: How many ratios the run gives, so that all intervals hold together (Bonferroni).

    Returns:
        Our rate / the other one's.
    """
    logs = [math.log(a / b) for a, b in zip(rates, baseline_rates, strict=True)]
    walsh = sorted((a + b) / 2 for a, b in combinations_with_replacement(logs, 2))
    tail = _signed_rank_tail(len(logs), (1 - CONFIDENCE) / 2 / of)
    middle = float(np.median(walsh))
    return Ratio(math.exp(middle), math.exp(walsh[tail]), math.exp(walsh[-1 - tail]))


def _signed_rank_tail(n: int, alpha: float) -> int:
    """How many of the smallest Walsh averages lie outside the interval.

    It is the largest c with P(T+ <= c - 1) <= alpha, or 0. With few rounds even the whole range is
    less sure than asked for.
    """
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1
    # the distribution of the sum of the ranks of positive signs
    for rank in range(1, n + 1):
        counts[rank:] = counts[rank:] + counts[: len(counts) - rank].copy()
    return int(np.searchsorted(np.cumsum(counts) / 2.0**n, alpha, side="right"))


@contextmanager
def _process(contender: Contender) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The contender's process, and the answer that it gives when it is set up."""
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
            remedy="see its output above",
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
                remedy="mend the contender: a figure for a wrong result says nothing",
            )
        errors[contender.name] = far
    return errors


def _child(make: str, options: Mapping[str, Any]) -> int:
    """Be the contender's own process: set up, answer, and do a round for every line that comes in.

    Only answers go to standard output.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints goes to standard error
    module, function = make.split(":")
    try:
        ready: Ready = getattr(importlib.import_module(module), function)(**options)
    except (MissingComponent, ImportError) as exc:
        answers.write(json.dumps({"absent": str(exc).splitlines()[0]}) + "\n")
        return 0
    answer: dict[str, Any] = {}
    if ready.output is not None:
        handle, path = tempfile.mkstemp(suffix=".npy")
        os.close(handle)
        np.save(path, ready.output())
        answer["output"] = path
    answers.write(json.dumps(answer) + "\n")
    for _ in sys.stdin:
        if ready.folder is not None:
            shutil.rmtree(ready.folder, ignore_errors=True)
            ready.folder.mkdir()
        # a contender that waits for the disk must not wait for the data of the one before
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
    if "output" in answer:
        Path(answer["output"]).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], json.loads(sys.argv[2])))
