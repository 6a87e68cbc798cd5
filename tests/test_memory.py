"""Pools: every byte counted, capped, reused."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import Synthesizer
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.errors import MemoryCapExceeded
from runtime.memory import ALIGNMENT, HOST_STREAM, HostPool
from runtime.volume import Geometry, LabelVolume


def test_every_byte_is_counted() -> None:
    pool = HostPool(cap=4096)
    a = pool.allocate(1, stream=HOST_STREAM)
    b = pool.allocate(257, stream=HOST_STREAM)
    assert (pool.stats.in_use, pool.stats.held, pool.stats.allocations) == (256 + 512, 256 + 512, 2)
    a.close()
    a.close()
    assert (pool.stats.in_use, pool.stats.held, pool.stats.peak) == (512, 768, 768)
    b.close()
    pool.close()
    assert (pool.stats.in_use, pool.stats.held, pool.stats.peak) == (0, 0, 768)


def test_blocks_are_aligned_and_reused() -> None:
    pool = HostPool(cap=1 << 20)
    first = pool.allocate(1000, stream=HOST_STREAM)
    assert first.ptr % ALIGNMENT == 0
    address = first.ptr
    first.close()
    second = pool.allocate(900, stream=HOST_STREAM)
    assert second.ptr == address and pool.stats.allocations == 1


def test_the_view_is_the_block() -> None:
    block = HostPool(cap=1 << 20).allocate(24, stream=HOST_STREAM)
    view = block.array((2, 3), np.float32)
    view[...] = 7
    assert view.ctypes.data == block.ptr and view.shape == (2, 3) and block.array((24,), np.uint8)[:4].view(np.float32)[0] == 7


def test_the_cap_holds_and_the_error_is_a_memory_error_with_the_numbers() -> None:
    pool = HostPool(cap=1024)
    kept = pool.allocate(512, stream=HOST_STREAM)
    with pytest.raises(MemoryCapExceeded, match="1024 more bytes would pass the pool's cap: 512 of 1024 bytes are in use") as caught:
        pool.allocate(1024, stream=HOST_STREAM)
    assert isinstance(caught.value, MemoryError) and pool.stats.in_use == 512
    kept.close()
    pool.allocate(1024, stream=HOST_STREAM).close()  # what is free in another size makes room
    assert pool.stats.held == 1024


def volume(depth: int) -> LabelVolume:
    return LabelVolume(np.ones((depth, 64, 64), np.uint8), Geometry(np.diag([3.0, 3.0, 3.0, 1.0])))


def test_steady_state_allocates_nothing_and_everything_comes_back() -> None:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as synth:
        synth.paint(volume(4))
        before = synth.memory.allocations
        for _ in range(3):
            synth.paint(volume(40))
        assert synth.memory.allocations == before and synth.memory.in_use == 0


def test_an_abandoned_stream_gives_its_memory_back() -> None:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest), batch=2) as synth:
        slabs = synth.slabs(volume(40))
        next(slabs)
        assert synth.memory.in_use > 0
        slabs.close()
        assert synth.memory.in_use == 0


def test_a_canvas_past_the_cap_is_refused() -> None:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest), cap=1000) as synth, pytest.raises(MemoryCapExceeded):
        synth.paint(volume(4))
