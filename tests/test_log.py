"""What a program that embeds the runtime sees of it in `logging`."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from samples import write_mask

from runtime import Synthesizer
from runtime.core.log import events_on_standard_error
from runtime.service.events import Events

SCRIPT = """
import sys
from runtime import Synthesizer
model, out, *masks = sys.argv[1:]
with Synthesizer.open(model, backend="fake") as synth:
    print([result.error is None for result in synth.stream(masks, out)])
"""


def masks(folder: Path) -> list[Path]:
    """A good mask, and a file that is none and whose name would move a terminal's cursor."""
    folder.mkdir()
    bad = folder / "b\x1b[2J.nii.gz"
    bad.write_bytes(b"no mask")
    return [write_mask(folder / "a.nii.gz"), bad]


def test_embedding_program_sees_log_records(
    fake_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mask2ct")
    with Synthesizer.open(fake_model, backend="fake") as synth:
        backend = synth.backend
        results = [*synth.stream(masks(tmp_path / "in"), tmp_path / "out", variants=1)]
    (error,) = (str(result.error) for result in results if result.error is not None)
    opened, *about_results = caplog.record_tuples
    assert opened == ("mask2ct.synthesizer", logging.INFO, f"opened fake: {backend}")
    assert sorted(about_results) == [
        ("mask2ct.batch.result", logging.INFO, "synthesized a.nii.gz, variant 0: 6 slices"),
        ("mask2ct.batch.result", logging.ERROR, error),
    ]
    assert r"b\x1b[2J.nii.gz" in error and "\x1b" not in error


def test_library_prints_no_record_itself(fake_model: Path, tmp_path: Path, command) -> None:
    """Without a handler of the program's own nothing is printed, not even an error's record."""
    done = command("-c", SCRIPT, fake_model, tmp_path / "out", *masks(tmp_path / "in"))
    assert done.stdout == "[False, True]\n" and done.stderr == ""


def test_events_are_lines_on_standard_error(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The command line has them as logfmt; a program has records with the same facts."""
    events = Events()
    with events_on_standard_error():
        events("rejected", peer="SENDER", reason="A\nB\x1b[2J")
    line = capsys.readouterr().err
    assert line.endswith("Z rejected peer=SENDER reason=A?B?[2J\n")
    with caplog.at_level(logging.INFO, "mask2ct"):
        events("stored", bytes=3)
    (record,) = (r for r in caplog.records if r.getMessage() == "stored")
    assert record.name == "mask2ct.service.events" and record.facts == {"bytes": 3}
    assert capsys.readouterr().err == ""
