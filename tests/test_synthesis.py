"""What the synthesizer promises of its results: the same bytes, any batch, any name, bounded
memory.
"""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from samples import blobs, image, results, synth, write_mask

from runtime import Synthesizer
from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.manifest import Label, LabelTable
from runtime.core.rng import CaseRandom
from runtime.core.volume import Geometry, LabelVolume
from runtime.engines.base import EngineError, EngineOptions
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.engines.memory import HostStream, Stream


def test_synthesis_bytes_independent_of_batch_order(tmp_path: Path, model: Path) -> None:
    """The bytes are the same for any batch, for any order and in a second run."""
    masks = [
        write_mask(tmp_path / f"{n}.nii.gz", blobs((9, 40, 50), seed=n), spacing=(3.0, 3.1, 2.0))
        for n in range(3)
    ]
    assert synth(model, tmp_path / "a", *masks, backend=None) == 0
    expected = results(tmp_path / "a")
    assert list(expected) == ["0_ct.nii.gz", "1_ct.nii.gz", "2_ct.nii.gz"]
    settings = {
        "b": ("--batch", "1"),
        "c": ("--batch", "16", "--workers", "1"),
        "d": ("--batch", "4", "--workers", "2"),
        "e": ("--workers", "4"),
    }
    for name, extra in settings.items():
        assert synth(model, tmp_path / name, *reversed(masks), *extra, backend=None) == 0
        assert results(tmp_path / name) == expected
    assert synth(model, tmp_path / "a", *masks, backend=None) == 0  # over its own results
    assert results(tmp_path / "a") == expected


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_resume_with_other_workers_keeps_results(tmp_path: Path, model: Path, backend: str) -> None:
    mask = write_mask(tmp_path / "case.nii.gz")
    for workers, kept in ((1, False), (3, True)):
        with Synthesizer.open(model, backend=backend, workers=workers) as opened:
            (result,) = opened.stream(mask, tmp_path / "out", resume=True)
            assert result.error is None and result.skipped == kept
    with Synthesizer.open(
        model, backend=backend, workers=3
    ) as opened:  # and rightly so: they synthesize the same bytes
        (again,) = opened.stream(mask, tmp_path / "again")
    assert dict(again.sha256) == dict(result.sha256)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_core_count_changes_no_byte(
    model: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """OpenVINO divides a slice between three threads otherwise than between two: the image
    differs by a HU here and there.
    """
    volumes, generated = (
        ((blobs((9, 40, 50)), (3.0, 3.1, 2.0)), (blobs((2, 256, 256)), (2.0, 2.0, 2.0))),
        set(),
    )
    for count, workers in ((1, None), (2, 1), (3, 1), (3, 3), (8, None)):
        for module in ("cpu.base", "cpu.onnxruntime", "cpu.openvino"):
            monkeypatch.setattr(
                f"runtime.engines.{module}.cores", lambda count=count: count, raising=False
            )
        with Synthesizer.open(model, backend=backend, workers=workers) as opened:
            for values, spacing in volumes:
                generated.add(
                    (
                        spacing,
                        opened.synthesize(
                            opened.volume(values, Geometry.from_spacing(spacing))
                        ).tobytes(),
                    )
                )
    assert len(generated) == 2


def test_large_plane_compression_independent_of_batch(tmp_path: Path, fake_model: Path) -> None:
    """A slab of several MiB reaches the compressor in the same pieces as single slices do."""
    mask = write_mask(tmp_path / "m.nii.gz", blobs((24, 320, 320)), spacing=(0.9, 0.9, 2.0))
    for batch in ("1", "7", "24"):
        assert synth(fake_model, tmp_path / batch, mask, "--batch", batch) == 0
    assert results(tmp_path / "1") == results(tmp_path / "7") == results(tmp_path / "24")


def test_noise_from_seed_variant_not_filename(tmp_path: Path, model: Path) -> None:
    """The seed and the variant change the noise; the file name does not."""
    for name in ("a", "b"):
        write_mask(tmp_path / f"{name}.nii.gz")
    assert (
        synth(model, tmp_path / "0", tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", backend=None)
        == 0
    )
    assert synth(model, tmp_path / "7", tmp_path / "a.nii.gz", "--seed", "7", backend=None) == 0
    first = results(tmp_path / "0")
    assert first["a_ct.nii.gz"] == first["b_ct.nii.gz"] != results(tmp_path / "7")["a_ct.nii.gz"]


def test_variants_come_with_their_masks(tmp_path: Path, model: Path) -> None:
    mask = write_mask(tmp_path / "case.nii.gz")
    assert (
        synth(
            model,
            tmp_path / "out",
            mask,
            "--variants",
            "2",
            "--report",
            tmp_path / "report.json",
            backend=None,
        )
        == 0
    )
    made = results(tmp_path / "out")
    assert list(made) == [
        "case_v0_ct.nii.gz",
        "case_v0_mask.nii.gz",
        "case_v1_ct.nii.gz",
        "case_v1_mask.nii.gz",
    ]
    assert made["case_v0_ct.nii.gz"] != made["case_v1_ct.nii.gz"]
    pair = sitk.ReadImage(str(tmp_path / "out" / "case_v0_mask.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(pair), blobs())
    report = json.loads((tmp_path / "report.json").read_text())
    assert [c["variant"] for c in report["cases"]] == [0, 1] and report["cases"][0]["slices"] == 6
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()  # file names, no paths


def test_variant_masks_hold_label_table_values(tmp_path: Path) -> None:
    """The masks of variants hold the values of the label table, whatever their size."""
    table = LabelTable((Label("background", 0), Label("a", 70000), Label("b", -3)))
    values = np.array([[[0, 70000, -3, 0]]], np.int32).repeat(4, 0).repeat(4, 1)
    path = write_mask(tmp_path / "m.nii.gz", values)
    manifest = fake_manifest(table)
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        (result,) = opened.stream([path], tmp_path / "out", variants=1)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(result.files[1]))), values)


def test_grid_digest_ignores_sign_of_zero() -> None:
    """Equal grids have equal digests, whichever way a reader writes zero."""
    labels, affine = np.zeros((2, 2, 2), np.uint8), np.diag([1.0, 1.0, 1.0, 1.0])
    negative = np.where(affine == 0, -0.0, affine)
    negative[3] = affine[3]
    assert (
        LabelVolume(labels, Geometry(affine)).digest
        == LabelVolume(labels, Geometry(negative)).digest
    )


def test_digest_follows_replaced_labels() -> None:
    """A deformed mask is another case, also where the digest of its source is known already."""
    grid = Geometry(np.eye(4))
    volume = LabelVolume(np.zeros((2, 3, 4), np.uint8), grid)
    assert volume.compute_digest() == volume.digest
    labels = np.ones((2, 3, 4), np.uint8)
    deformed = replace(volume, labels=labels)
    assert deformed.digest == LabelVolume(labels, grid).digest != volume.digest


def test_mask_digest_sees_any_difference() -> None:
    """Masks that differ anywhere have other digests, whatever their memory layout is.

    The digest keys every random number, so that one case never repeats another's noise.
    """
    rng, grid = np.random.default_rng(0), Geometry(np.eye(4))
    volumes = [rng.integers(0, high, (2, 3, 4), np.uint8) for high in (1, 2, 8)]
    for volume in list(volumes):
        for place in np.ndindex(volume.shape):
            other = volume.copy()
            other[place] ^= 1
            volumes.append(other)
    volumes += [volume.reshape(3, 2, 4) for volume in volumes] + [
        volume.reshape(2, 4, 3) for volume in volumes
    ]
    kinds = {(volume.shape, volume.tobytes()): volume for volume in volumes}
    assert len({LabelVolume(volume, grid).digest for volume in kinds.values()}) == len(kinds)
    for volume in volumes[:3]:
        assert (
            LabelVolume(np.asfortranarray(volume), grid).digest == LabelVolume(volume, grid).digest
        )


def test_command_stream_and_call_agree(tmp_path: Path, model: Path) -> None:
    path = write_mask(tmp_path / "m.nii.gz")
    assert synth(model, tmp_path / "out", path, "--seed", "3", backend=None) == 0
    by_command = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "m_ct.nii.gz")))
    with Synthesizer.open(model) as opened:
        by_call = sitk.GetArrayFromImage(opened(sitk.ReadImage(str(path)), seed=3))
        (result,) = opened.stream([path], tmp_path / "streamed", seed=3)
    assert np.array_equal(by_command, by_call)
    assert result.files[0].read_bytes() == (tmp_path / "out" / "m_ct.nii.gz").read_bytes()


def test_label_map_by_name_value_rest(tmp_path: Path, fake_model: Path) -> None:
    """Labels can be mapped by name, by value and for all the rest."""
    values = np.array([[[0, 5, 7, 900]]], np.uint16).repeat(4, 0).repeat(4, 1)
    path = write_mask(tmp_path / "m.nii.gz", values, spacing=(3.0, 3.0, 3.0))
    (tmp_path / "map.json").write_text(
        json.dumps({"5": "left ventricle", "7": 850, "*": "background"})
    )
    assert synth(fake_model, tmp_path / "out", path, "--labels", tmp_path / "map.json") == 0
    ct = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "m_ct.nii.gz")))
    assert ct[0, 0].tolist() == [-1024, round(-1024 + 3 * 2048 / 7), 1024, -1024]


def test_mm_whs_421_is_left_atrium(tmp_path: Path, fake_model: Path) -> None:
    """The stray value 421 of MM-WHS is read as the left atrium."""
    for name, value in (("a", 420), ("b", 421)):
        write_mask(
            tmp_path / f"{name}.nii.gz", np.where(blobs() == 420, value, blobs()).astype(np.uint16)
        )
    assert synth(fake_model, tmp_path / "out", tmp_path) == 0
    made = results(tmp_path / "out")
    assert made["a_ct.nii.gz"] == made["b_ct.nii.gz"]


def test_label_map_negative_and_sparse_values(tmp_path: Path, fake_model: Path) -> None:
    values = np.where(blobs() == 205, -3, np.where(blobs() == 500, 70000, 0)).astype(np.int32)
    (tmp_path / "map.json").write_text(
        json.dumps({"-3": "myocardium", "70000": "left ventricle", "0": "background"})
    )
    write_mask(tmp_path / "a.nii.gz", values)
    write_mask(
        tmp_path / "b.nii.gz", np.where(np.isin(blobs(), (205, 500)), blobs(), 0).astype(np.uint16)
    )
    assert (
        synth(
            fake_model, tmp_path / "out", tmp_path / "a.nii.gz", "--labels", tmp_path / "map.json"
        )
        == 0
    )
    assert synth(fake_model, tmp_path / "out", tmp_path / "b.nii.gz") == 0
    a, b = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"{n}_ct.nii.gz")))
        for n in "ab"
    )
    assert np.array_equal(a, b)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_synthesis_never_holds_all_slices_float(axis: int) -> None:
    """512 slices of 128 x 128: the mask is 8 MiB, a float32 copy 32 MiB; the slices in flight
    are far less.
    """
    shape = [128, 128, 128]
    shape[axis] = 512
    direction = {0: np.eye(3), 1: np.eye(3)[:, [0, 2, 1]], 2: np.eye(3)[:, [2, 1, 0]]}[axis]
    volume = LabelVolume(
        np.ones(shape, np.uint8), Geometry.from_parts((0, 0, 0), (3.0, 3.0, 3.0), direction.ravel())
    )
    manifest = fake_manifest()
    with Synthesizer(
        manifest, FakeEngine(manifest, options=EngineOptions(workers=1)), batch=4
    ) as opened:
        tracemalloc.start()
        try:
            count = sum(
                slab.hu.shape[slab.axis] for slab in opened.slabs(volume) if slab.axis == axis
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert count == 512 and peak < 5 << 20


class Waited(FakeEngine):
    """Computes when somebody waits, in the order given and no further than that: `woken` says
    how often there was something to wait for.
    """

    def __init__(self) -> None:
        super().__init__(fake_manifest(), batch=1, options=EngineOptions(workers=1))
        self.queue, self.woken = deque[tuple[Stream, Callable[[], None]]](), 0

    def open_stream(self) -> Stream:
        return WaitedStream(self)


class WaitedStream(HostStream):
    def __init__(self, engine: Waited):
        self.engine = engine

    def submit(self, work: Callable[[], None]) -> None:
        self.engine.queue.append((self, work))

    def synchronize(self) -> None:
        queue = self.engine.queue
        self.engine.woken += any(stream is self for stream, _ in queue)
        while any(stream is self for stream, _ in queue):
            queue.popleft()[1]()

    close = synchronize


@pytest.mark.parametrize("count", [1, 2, 60])
def test_synthesis_wakes_per_half_queue(count: int) -> None:
    """Synthesis wakes once for half of the slices in flight.

    To wake for each slice would interrupt, every time, a core that computes the next.
    """
    volume = LabelVolume(
        (blobs((count, 30, 30)) > 0).astype(np.uint8), Geometry(np.diag([3.0, 3.0, 3.0, 1.0]))
    )
    engine = Waited()
    with (
        Synthesizer(fake_manifest(), engine) as waited,
        Synthesizer(fake_manifest(), FakeEngine(fake_manifest())) as plain,
    ):
        assert np.array_equal(waited.synthesize(volume), plain.synthesize(volume))
    half = engine.spec.streams // 2
    assert (
        engine.woken <= count / half + half.bit_length() + 1 and engine.woken <= count
    )  # the last ones by halves of what is left


class Permitted(FakeEngine):
    """Computes as many batches as `permits` lets it; `begun` counts."""

    def __init__(self, permits: int):
        super().__init__(fake_manifest(), batch=1, options=EngineOptions(workers=1))
        self.permits, self.begun = threading.Semaphore(permits), 0

    def _infer(self, *given: Any) -> None:
        self.begun += 1
        self.permits.acquire()
        super()._infer(*given)


def test_interrupted_synthesis_drops_queued_slices() -> None:
    """Who presses Ctrl-C waits for the slice that is computed, not for all that are queued
    behind it.
    """
    half = FakeEngine(fake_manifest(), options=EngineOptions(workers=1)).spec.streams // 2
    engine = Permitted(half)
    volume = LabelVolume(np.ones((60, 30, 30), np.uint8), Geometry(np.diag([3.0, 3.0, 3.0, 1.0])))
    with Synthesizer(fake_manifest(), engine, batch=1) as opened:
        slabs = opened.slabs(volume)
        next(slabs)
        slot = opened.memory()["host"].in_use // (2 * half)
        closing = threading.Thread(target=slabs.close)  # type: ignore[attr-defined]
        closing.start()
        end = time.monotonic() + 5
        while opened.memory()["host"].in_use > (half + 1) * slot and time.monotonic() < end:
            closing.join(0.01)
        engine.permits.release(60)
        closing.join()
        assert engine.begun <= half + 1 and opened.memory()["host"].in_use == 0


def test_slabs_fill_volume_in_order() -> None:
    """Slabs belong to the receiver and fill the volume in order."""
    volume = LabelVolume(
        (blobs((11, 30, 30)) > 0).astype(np.uint8), Geometry(np.diag([3.0, 3.0, 3.0, 1.0]))
    )
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest), batch=4) as opened:
        slabs = list(opened.slabs(volume))
        whole = opened.synthesize(volume)
    assert [s.start for s in slabs] == [0, 4, 8]
    assert all(
        np.array_equal(whole[s.index], s.hu) for s in slabs
    )  # kept slabs were not overwritten by later ones


def test_closed_synthesizer_error_says_so(model: Path) -> None:
    opened = Synthesizer.open(model)
    opened.close()
    opened.close()
    with pytest.raises(EngineError, match="closed"):
        opened(image(blobs()))


def test_backend_text_states_choice_and_reason(model: Path) -> None:
    with Synthesizer.open(model) as opened:
        assert "the fastest that is installed and validated for this model" in opened.backend
    with Synthesizer.open(model, backend="onnx") as opened:
        assert "onnxruntime" in opened.backend and "asked for" in opened.backend


def test_noise_is_white_uniform_and_keyed() -> None:
    case = CaseRandom(1, b"digest", 0)
    noise = case.noise(3, (512, 512))
    counts = np.bincount(noise.ravel(), minlength=256)
    assert (
        abs(noise.mean() - 127.5) < 1
        and abs(noise.std() - 73.9) < 1
        and counts.min() > 850
        and counts.max() < 1200
    )
    centred = noise - 127.5
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 60  # of a variance of 5461
    others = [
        CaseRandom(2, b"digest", 0).noise(3, (8, 8)),
        CaseRandom(1, b"other", 0).noise(3, (8, 8)),
        CaseRandom(1, b"digest", 1).noise(3, (8, 8)),
        case.noise(4, (8, 8)),
    ]
    assert len({n.tobytes() for n in [case.noise(3, (8, 8)), *others]}) == 5
    assert case.noise(0, (2, 4)).tolist() == CaseRandom(1, b"digest", 0).noise(0, (2, 4)).tolist()


def test_list_and_dry_run_write_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mask(tmp_path / "masks" / "a.nii.gz") if (tmp_path / "masks").mkdir() is None else None
    arguments = [
        "synth",
        str(tmp_path / "masks"),
        "--model",
        str(model),
        "--output",
        str(tmp_path / "out"),
    ]
    assert run(main, [*arguments, "--list"]) == 0
    listed = capsys.readouterr().out
    assert (
        str(tmp_path / "masks" / "a.nii.gz") in listed
        and "24 x 20 x 6" in listed
        and listed.startswith("volume")
    )
    assert run(main, [*arguments, "--dry-run"]) == 0
    assert "24 x 20 x 6 voxels of 1.5 x 1.25 x 2.5 mm, 6 slices" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [("--mirror",), ("--any-topology",), ("--deform", "4"), ("--rotate", "0"), ("--scale", "0.1")],
)
def test_variant_options_need_variants(
    option: tuple[str, ...], fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = write_mask(tmp_path / "mask.nii.gz")
    assert synth(fake_model, tmp_path / "out", mask, *option) == 2
    assert "--variants K with them" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert synth(fake_model, tmp_path / "out", mask, *option, "--variants", "2") == 0


def test_dry_run_names_failing_masks(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far, unknown = (
        write_mask(tmp_path / "far.nii.gz", spacing=(500, 500, 3)),
        write_mask(tmp_path / "unknown.nii.gz", blobs(values=(0, 7))),
    )
    assert synth(fake_model, tmp_path / "out", far, unknown, "--dry-run") == 1
    said = capsys.readouterr().err
    assert "far.nii.gz" in said and "canvas" in said and "unknown.nii.gz holds 7" in said
    assert (
        synth(
            fake_model,
            tmp_path / "out",
            write_mask(tmp_path / "good.nii.gz"),
            "--dry-run",
            "--variants",
            "0",
        )
        == 2
    )
    assert not (tmp_path / "out").exists()


def test_labels_command_counts_voxels_and_millilitres(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.zeros((4, 10, 10), np.uint16)
    values[1, :5, :4] = 500
    path = write_mask(tmp_path / "m.nii.gz", values, spacing=(10.0, 10.0, 10.0))
    assert run(main, ["labels", str(path), "--model", str(model)]) == 0
    assert "500          20       20.0  left ventricle" in capsys.readouterr().out
    values[2, 0, 0] = 9
    write_mask(path, values)
    assert run(main, ["labels", str(path)]) == 1
    assert "UNKNOWN" in capsys.readouterr().out


def test_describe_verifies_every_file(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, ["describe", str(model)]) == 0
    text = capsys.readouterr().out
    assert (
        "model.onnx: fp32" in text
        and "verified" in text
        and "500 left ventricle" in text
        and "parity check: differences" in text
    )
