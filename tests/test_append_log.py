"""Logs to which lines are only added: torn lines, full disks, and the logs of training."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.harness import history
from runtime.batch.completion_log import JOURNAL, Entry, Journal
from runtime.core.append_log import AppendLog
from runtime.core.errors import OutputError, UsageError
from train.reporting.html import read_metrics


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block, a write beyond `size` bytes stops early and then fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def entry(name: str) -> Entry:
    return Entry(name, "key", {f"{name}.nii.gz": "digest"}, 1)


def test_journal_continues_after_full_disk(tmp_path: Path) -> None:
    """The process that could not write a line goes on, and its next lines are read again."""
    journal = Journal(tmp_path)
    journal.add(entry("a"))
    with largest_file((tmp_path / JOURNAL).stat().st_size + 20), pytest.raises(OutputError):
        journal.add(entry("b"))
    journal.add(entry("c"))
    journal.close()
    again = Journal(tmp_path)
    assert [*again.entries] == ["a", "c"]
    again.close()


@pytest.mark.parametrize("checksums", [True, False])
def test_log_cut_anywhere_goes_on(checksums: bool, tmp_path: Path) -> None:
    """Whichever byte is the last one, whole lines are read and new ones can be added."""
    rows = [{"step": n, "loss": n / 7} for n in range(3)]
    log = AppendLog(tmp_path / "whole", checksums=checksums)
    log.add(*rows)
    content = log.path.read_bytes()
    for length in range(len(content) + 1):
        cut = AppendLog(tmp_path / f"{length}", checksums=checksums)
        cut.path.write_bytes(content[:length])
        # A line without its newline is whole all the same.
        lines = content[:length].count(b"\n") + (content[length : length + 1] == b"\n")
        cut.add({"step": 9})
        assert cut.read() == [*rows[:lines], {"step": 9}]


def test_log_refuses_links_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("pipe", "link"):
        with pytest.raises(OutputError, match="not a regular file"):
            AppendLog(tmp_path / name).add({})
    assert not (tmp_path / "elsewhere").exists()


def test_torn_metrics_line_is_left_out(tmp_path: Path) -> None:
    """A report of a run that was killed while it wrote has all other lines."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 2\n{"step": 20}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 10}, {"step": 20}]


def test_torn_benchmark_record_is_named(tmp_path: Path) -> None:
    """It spoils no later record, and a person is told which line to remove."""
    file = tmp_path / "history.jsonl"
    file.write_text('{"suite": "io"}\n{"sui')
    history.append([{"suite": "engine"}], file)  # type: ignore[list-item]
    lines = file.read_text().splitlines()
    assert json.loads(lines[2]) == {"suite": "engine"}
    with pytest.raises(UsageError, match="line 2"):
        history.load(file)
