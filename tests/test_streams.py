"""What a terminal or a log cannot say is written in other signs; it ends no command."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import write_mask

COMMANDS = {
    "runtime": [
        "-m",
        "runtime",
        "synth",
        "MASK",
        "--model",
        "MODEL",
        "--output",
        "OUT",
        "--backend",
        "fake",
    ],
    "train": [
        "train/run.py",
        "--config",
        "train/configs/phantom.json",
        "--dataset-path",
        "→",
        "--output",
        "OUT",
    ],
    "export": ["export/build_engine.py", "→", "-o", "OUT", "--onnx-only"],
}


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
@pytest.mark.parametrize("name", COMMANDS)
def test_unencodable_characters_print_as_escapes(
    name: str, encoding: str, command, fake_model: Path, tmp_path: Path
) -> None:
    """A character that the stream cannot encode ends no command."""
    places = {
        "MASK": write_mask(tmp_path / "arrow→.nii.gz"),
        "MODEL": fake_model,
        "OUT": tmp_path / "out",
    }
    line = [places.get(word, word) for word in COMMANDS[name]]
    done = command(*line, env={"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0"})
    assert "Traceback" not in done.stderr and "UnicodeEncodeError" not in done.stderr
    assert done.returncode == (0 if name == "runtime" else 2), done.stderr
    if name == "runtime":
        assert (
            "\\u2192" in done.stdout
            and "\\u2192" in done.stderr
            and (tmp_path / "out" / "arrow→_ct.nii.gz").is_file()
        )
    else:
        assert done.stderr.startswith("error: ") and "\\u2192" in done.stderr
