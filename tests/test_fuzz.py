"""Damaged masks of every format, each through the whole command in a process of its own: `make
fuzz` tries ten times as many.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fuzz import FORMATS

COUNT = os.environ.get("MASK2CT_FUZZ", "200")


@pytest.mark.slow
def test_damaged_file_works_or_is_refused(root: Path) -> None:
    def fuzz(kind: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", root / "tests" / "fuzz.py", kind, COUNT],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        return (
            ""
            if done.returncode == 0 and '"0"' in done.stdout and '"1"' in done.stdout
            else f"{kind}:\n{done.stdout[-3000:]}"
        )

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        failed = [text for text in pool.map(fuzz, FORMATS) if text]
    assert not failed, "\n".join(failed)
