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


def test_blocks_are_aligned_and_reused() -> None:
    pool = pool_of(1 << 20)
    first = pool.allocate(1000, stream=HOST_STREAM)
    assert first.ptr % ALIGNMENT == 0
    address = first.ptr
    first.close()
    second = pool.allocate(900, stream=HOST_STREAM)
    assert second.ptr == address and pool.stats.allocations == 1


def test_the_view_is_the_block() -> None:
    block = pool_of(1 << 20).allocate(24, stream=HOST_STREAM)
    view = block.array((2, 3), np.float32)
    view[...] = 7
    assert (
        view.ctypes.data == block.ptr
        and view.shape == (2, 3)
        and block.array((24,), np.uint8)[:4].view(np.float32)[0] == 7
    )


def test_the_cap_holds_and_the_error_is_a_memory_error_with_the_numbers() -> None:
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


def test_purposes_are_counted_on_top_of_the_pool_and_reserved_bytes_lessen_the_cap() -> None:
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


def test_one_pool_serves_several_threads() -> None:
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
def test_amounts_are_read_as_people_write_them(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "1 PiB", "0.2 b", "1e9", "GiB"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not an amount of memory"):
        parse_bytes(text)


def volume(depth: int, side: int = 64) -> LabelVolume:
    return LabelVolume(
        np.ones((depth, side, side), np.uint8), Geometry(np.diag([3.0, 3.0, 3.0, 1.0]))
    )


def test_steady_state_allocates_nothing_and_everything_comes_back() -> None:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as synth:
        synth.synthesize(volume(4))
        before = synth.memory()["host"]
        for _ in range(3):
            synth.synthesize(volume(40))
        assert synth.memory()["host"] == before and set(before.tags) == {"labels", "noise", "ct"}
    after = synth.memory()["host"]
    assert after.in_use == after.held == 0 and all(u.in_use == 0 for u in after.tags.values())


def test_another_canvas_takes_the_memory_of_the_last_one() -> None:
    """Labels past the canvas make it grow; both together would pass the cap."""
    manifest = fake_manifest()
    small, large = volume(4, 32), volume(4, 64)
    engine = FakeEngine(manifest, options=EngineOptions(max_memory=2 * 2 * 4 * 96 * 96, workers=1))
    with Synthesizer(manifest, engine) as synth:
        assert synth.grid(large).size != synth.grid(small).size
        for _ in range(2):
            synth.synthesize(small)
            synth.synthesize(large)


def test_a_cap_that_holds_one_slice_at_a_time_changes_no_byte() -> None:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as synth:
        want = synth.synthesize(volume(7))
        slots, in_use = synth._engine.spec.streams, synth.memory()["host"].peak
    with Synthesizer(
        manifest, FakeEngine(manifest, options=EngineOptions(max_memory=in_use // slots))
    ) as synth:
        assert np.array_equal(synth.synthesize(volume(7)), want)
        assert synth.memory()["host"].in_use == in_use // slots


def test_memory_goes_back_after_the_work_in_it_also_when_the_wait_for_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C ends a wait wherever it is; here at its first step, for a signal may come after all
    is done.
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


def test_an_abandoned_stream_gives_its_memory_back() -> None:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest), batch=2) as synth:
        slabs = synth.slabs(volume(40))
        next(slabs)
        assert synth.memory()["host"].in_use > 0
        slabs.close()
        assert synth.memory()["host"].in_use == 0


def test_a_canvas_past_the_cap_is_refused_and_nothing_stays_taken() -> None:
    manifest = fake_manifest()
    with Synthesizer(
        manifest, FakeEngine(manifest, options=EngineOptions(max_memory=10000))
    ) as synth:
        with pytest.raises(MemoryCapExceeded, match="10000 bytes are in use"):
            synth.synthesize(volume(4))
        assert synth.memory()["host"].in_use == 0
