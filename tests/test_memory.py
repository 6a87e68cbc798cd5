"""Pools: every byte counted, capped, reused."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from runtime import Synthesizer
from runtime.core.errors import MemoryCapExceeded, UsageError
from runtime.core.rng import CaseRandom
from runtime.core.volume import Geometry, LabelVolume
from runtime.engines.base import EngineOptions, Inputs
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.engines.memory import ALIGNMENT, HOST_STREAM, HostMemory, Pool, parse_bytes


def pool_of(cap: int) -> Pool:
    return Pool(HostMemory(), cap)


def test_every_byte_is_counted() -> None:
    pool = pool_of(4096)
    a = pool.allocate(1, stream=HOST_STREAM)
    b = pool.allocate(257, stream=HOST_STREAM)
    assert (pool.stats.in_use, pool.stats.held, pool.stats.allocations) == (256 + 512, 256 + 512, 2)
    a.close()
    a.close()
    assert (pool.stats.in_use, pool.stats.held, pool.stats.peak) == (512, 768, 768)
    b.close()
    pool.close()
    assert (pool.stats.in_use, pool.stats.held, pool.stats.peak) == (0, 0, 768)


def test_memory_blocks_aligned_and_reused() -> None:
    pool = pool_of(1 << 20)
    first = pool.allocate(1000, stream=HOST_STREAM)
    assert first.ptr % ALIGNMENT == 0
    address = first.ptr
    first.close()
    second = pool.allocate(900, stream=HOST_STREAM)
    assert second.ptr == address and pool.stats.allocations == 1


def test_array_view_shares_block() -> None:
    block = pool_of(1 << 20).allocate(24, stream=HOST_STREAM)
    view = block.array((2, 3), np.float32)
    view[...] = 7
    assert (
        view.ctypes.data == block.ptr
        and view.shape == (2, 3)
        and block.array((24,), np.uint8)[:4].view(np.float32)[0] == 7
    )


def test_memory_cap_error_states_bytes() -> None:
    """The cap holds, and the error is a MemoryError that states the numbers."""
    pool = pool_of(1024)
    kept = pool.allocate(512, stream=HOST_STREAM)
    with pytest.raises(
        MemoryCapExceeded,
        match="1024 more bytes would pass the pool's cap: 512 of 1024 bytes are in use",
    ) as caught:
        pool.allocate(1024, stream=HOST_STREAM)
    assert isinstance(caught.value, MemoryError) and pool.stats.in_use == 512
    kept.close()
    pool.allocate(1024, stream=HOST_STREAM).close()  # what is free in another size makes room
    assert pool.stats.held == 1024


def test_memory_tags_and_reserved_bytes() -> None:
    """Bytes are counted by purpose as well, and reserved bytes lessen the cap."""
    pool = pool_of(4096)
    labels = [pool.tag("labels").allocate(256, stream=HOST_STREAM) for _ in range(2)]
    weights = pool.reserve(2000, "weights")
    labels[0].close()
    stats = pool.stats
    assert {name: (u.in_use, u.peak, u.buffers) for name, u in stats.tags.items()} == {
        "labels": (256, 512, 2),
        "weights": (2000, 2000, 1),
    }
    assert (stats.in_use, stats.held, stats.peak) == (2256, 2512, 2512)
    with pytest.raises(MemoryCapExceeded):
        pool.allocate(4096 - 2000, stream=HOST_STREAM)
    for buffer in (*labels, weights):
        buffer.close()
    assert pool.stats.in_use == 0 and all(u.in_use == 0 for u in pool.stats.tags.values())


def test_memory_pool_serves_threads() -> None:
    pool = pool_of(1 << 20)

    def use(seed: int) -> bool:
        for n in range(200):
            with closing(
                pool.tag("x").allocate(256 * (1 + (seed + n) % 5), stream=HOST_STREAM)
            ) as block:
                view = block.array((256,), np.uint8)
                view[...] = seed
                if not (view == seed).all():
                    return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(8)))
    assert pool.stats.in_use == 0 and pool.stats.tags["x"].buffers == 1600


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GiB", 2 << 30),
        ("512 mib", 512 << 20),
        ("1.5g", 3 << 29),
        (4096, 4096),
        ("100", 100),
        ("64KB", 65536),
    ],
)
def test_memory_amounts_are_parsed(text: str | int, nbytes: int) -> None:
    """Amounts of memory are read as people write them."""
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "1 PiB", "0.2 b", "1e9", "GiB"])
def test_bad_memory_amounts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not an amount of memory"):
        parse_bytes(text)


def volume(depth: int, side: int = 64) -> LabelVolume:
    return LabelVolume(
        np.ones((depth, side, side), np.uint8), Geometry(np.diag([3.0, 3.0, 3.0, 1.0]))
    )


def test_steady_state_allocates_nothing() -> None:
    """Everything comes back to the pool at the end."""
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as synth:
        synth.synthesize(volume(4))
        before = synth.memory()["host"]
        for _ in range(3):
            synth.synthesize(volume(40))
        assert synth.memory()["host"] == before and set(before.tags) == {"labels", "noise", "ct"}
    after = synth.memory()["host"]
    assert after.in_use == after.held == 0 and all(u.in_use == 0 for u in after.tags.values())


def test_new_canvas_reuses_memory() -> None:
    """Another canvas takes the memory of the last one.

    Labels past the canvas make it grow; both together would pass the cap.
    """
    manifest = fake_manifest()
    small, large = volume(4, 32), volume(4, 64)
    engine = FakeEngine(manifest, options=EngineOptions(max_memory=2 * 2 * 4 * 96 * 96, workers=1))
    with Synthesizer(manifest, engine) as synth:
        assert synth.grid(large).size != synth.grid(small).size
        for _ in range(2):
            synth.synthesize(small)
            synth.synthesize(large)


def test_one_slice_memory_cap_same_bytes() -> None:
    """A cap under which one slice at a time fits changes no byte of the result."""
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as synth:
        want = synth.synthesize(volume(7))
        slots, in_use = synth._engine.spec.streams, synth.memory()["host"].peak
    with Synthesizer(
        manifest, FakeEngine(manifest, options=EngineOptions(max_memory=in_use // slots))
    ) as synth:
        assert np.array_equal(synth.synthesize(volume(7)), want)
        assert synth.memory()["host"].in_use == in_use // slots


def test_interrupted_wait_returns_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory goes back after the work in it, also where the wait for it was interrupted.

    Ctrl-C ends a wait wherever it is; here at its first step, for a signal may come after all is
    done.
    """
    manifest, begun, go = fake_manifest(), threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def _infer(self, inputs: Inputs, out: np.ndarray) -> None:
            begun.set()
            go.wait(30)
            super()._infer(inputs, out)

    def interrupted(one: Future[None]) -> BaseException | None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with Synthesizer(manifest, Slow(manifest, options=EngineOptions(workers=1))) as synth:
        grid = synth.grid(volume(1))
        slot, *_ = synth._borrow(grid.size)
        slot.start(grid, volume(1).labels, CaseRandom(0, b"", 0), range(1))
        assert begun.wait(30)
        monkeypatch.setattr("runtime.engines.cpu.base._wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slot.wait()
        in_use = synth.memory()["host"].in_use
        closing = threading.Thread(target=slot.close)
        closing.start()
        closing.join(0.1)
        assert closing.is_alive() and synth.memory()["host"].in_use == in_use
        go.set()
        closing.join()
        assert synth.memory()["host"].in_use < in_use


def test_abandoned_stream_returns_memory() -> None:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest), batch=2) as synth:
        slabs = synth.slabs(volume(40))
        next(slabs)
        assert synth.memory()["host"].in_use > 0
        slabs.close()
        assert synth.memory()["host"].in_use == 0


def test_canvas_past_cap_is_refused() -> None:
    """A canvas past the cap is refused, and no memory stays in use."""
    manifest = fake_manifest()
    with Synthesizer(
        manifest, FakeEngine(manifest, options=EngineOptions(max_memory=10000))
    ) as synth:
        with pytest.raises(MemoryCapExceeded, match="10000 bytes are in use"):
            synth.synthesize(volume(4))
        assert synth.memory()["host"].in_use == 0
