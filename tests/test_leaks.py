"""What is opened again and again costs no more the hundredth time."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from runtime import Geometry, Synthesizer

OPENINGS = 40
GROWTH = 24 << 20  # bytes; a model that stayed would take more than this in so many openings


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fake", "onnx", "openvino"])
def test_repeated_opening_leaks_nothing(backend: str, model: Path, fake_model: Path) -> None:
    folder = fake_model if backend == "fake" else model
    values = np.zeros((4, 64, 64), np.uint16)
    values[:, 16:48, 16:48] = 205

    def once() -> bytes:
        with Synthesizer.open(folder, backend=backend, workers=1) as synthesizer:
            volume = synthesizer.volume(values, Geometry.from_spacing((3.0, 3.0, 3.0)))
            return synthesizer.synthesize(volume, seed=1).tobytes()

    first = once()
    for _ in range(4):  # what a library keeps after its first use is kept by now
        once()
    gc.collect()
    memory, descriptors = resident_bytes(), open_descriptors()
    assert all(once() == first for _ in range(OPENINGS))
    gc.collect()
    assert resident_bytes() - memory < GROWTH
    assert open_descriptors() <= descriptors
