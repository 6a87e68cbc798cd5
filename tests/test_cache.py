"""Slices that were decoded once: the same tensors, made anew when anything they depend on
changed or the file was damaged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import MM_WHS_VALUES, blobs, image

from runtime.core.atomic_files import temporary_name
from runtime.core.errors import OutputError
from runtime.core.labels import MM_WHS
from runtime.core.manifest import GridPolicy, Intensity
from runtime.core.tissue_classes import HU_CONTEXT
from train.config import DataConfig
from train.data import dataset
from train.data import slice_cache as caching
from train.data.dataset import Batches, Pair, Slices, find_pairs, load_cohort, load_patient
from train.data.slice_cache import SliceCache

HU = Intensity("HU", -1024, 1024)
POLICY = GridPolicy((32, 24), (1.5, 1.5), 8, slices=3, slice_spacing=2.5)


def write_patient(folder: Path, name: str, seed: int) -> None:
    ct = np.random.default_rng(seed).integers(-1000, 1000, (6, 20, 24)).astype(np.int16)
    sitk.WriteImage(image(ct), str(folder / f"{name}_image.nii.gz"))
    sitk.WriteImage(
        image(blobs(values=MM_WHS_VALUES, seed=seed)), str(folder / f"{name}_label.nii.gz")
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for n in range(3):
        write_patient(tmp_path / "data", f"p{n}", n)
    return tmp_path / "data"


@pytest.fixture
def pair(folder: Path) -> Pair:
    return find_pairs(folder)[0]


@pytest.fixture
def cache(tmp_path: Path) -> SliceCache:
    return SliceCache(tmp_path / "slices")


def entries(cache: SliceCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def assert_equal(a: Slices, b: Slices) -> None:
    assert (
        (a.labels.dtype, a.image.dtype) == (b.labels.dtype, b.image.dtype) == (np.uint8, np.int16)
    )
    assert np.array_equal(a.labels, b.labels) and np.array_equal(a.image, b.image)
    assert a.facts == b.facts


def test_cached_cohort_equals_decoded_cohort(folder: Path, cache: SliceCache) -> None:
    arguments = (find_pairs(folder), DataConfig(), MM_WHS, POLICY, HU)
    plain = load_cohort(*arguments)
    for _ in range(2):  # filled, then read
        cached = load_cohort(*arguments, cache)
        assert cached.digest == plain.digest and cached.summary() == plain.summary()
        assert cached.table(MM_WHS, HU) == plain.table(MM_WHS, HU) and "spacing" in cached.table(
            MM_WHS, HU
        )
        for a, b in zip((*plain.train, *plain.valid), (*cached.train, *cached.valid), strict=True):
            assert_equal(a, b)
        for step in (0, 3):
            for x, y in zip(
                Batches(plain.train, 4, 7, HU)[step],
                Batches(cached.train, 4, 7, HU)[step],
                strict=True,
            ):
                assert x.dtype == y.dtype and np.array_equal(x, y) and y.flags.writeable
    assert len(entries(cache)) == 3 and not [p for p in entries(cache) if p.suffix != ".npy"]
    with pytest.raises(ValueError, match="read-only"):
        cached.train[0].image[0] = 0


def test_second_run_decodes_nothing(
    pair: Pair, cache: SliceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run neither decodes nor writes anything."""
    first = cache(pair, MM_WHS, POLICY, HU)
    before = [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in entries(cache)]
    monkeypatch.setattr(dataset, "read_pair", None)  # decoding would end here
    assert_equal(first, cache(pair, MM_WHS, POLICY, HU))
    assert before == [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in entries(cache)]


def test_moved_file_keeps_cache_entry(folder: Path, pair: Pair, cache: SliceCache) -> None:
    """A file that moved is still known, and one that changed is not."""
    cache(pair, MM_WHS, POLICY, HU)
    moved = Pair(
        "other",
        pair.image.rename(folder / "other_image.nii.gz"),
        pair.label.rename(folder / "other_label.nii.gz"),
    )
    cache(moved, MM_WHS, POLICY, HU)
    assert len(entries(cache)) == 1
    write_patient(folder, "other", 9)
    assert_equal(cache(moved, MM_WHS, POLICY, HU), load_patient(moved, MM_WHS, POLICY, HU))
    assert len(entries(cache)) == 2


def test_voxels_beside_a_header_count(folder: Path) -> None:
    for name in ("image", "label"):
        sitk.WriteImage(image(blobs()), str(folder / f"d_{name}.mhd"))
    pair = Pair("d", folder / "d_image.mhd", folder / "d_label.mhd")
    before = caching.key(pair, MM_WHS, POLICY, HU)
    sitk.WriteImage(image(blobs()[::-1]), str(folder / "d_label.mhd"))
    assert caching.key(pair, MM_WHS, POLICY, HU) != before


def test_each_setting_has_its_cache_entry(
    pair: Pair, cache: SliceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (MM_WHS, POLICY, HU)
    fewer = replace(
        MM_WHS,
        labels=(replace(MM_WHS.labels[0], aliases=(MM_WHS.labels[7].value,)), *MM_WHS.labels[1:7]),
    )
    settings = [
        whole,
        (fewer, POLICY, HU),
        (MM_WHS, replace(POLICY, canvas=(32, 32)), HU),
        (MM_WHS, replace(POLICY, pixel_spacing=(1.0, 1.5)), HU),
        (MM_WHS, replace(POLICY, slice_spacing=5.0), HU),
        (MM_WHS, POLICY, Intensity("HU", -1000, 1024)),
    ]
    for count, setting in enumerate(settings, 1):
        assert_equal(cache(pair, *setting), load_patient(pair, *setting))
        assert len(entries(cache)) == count
    monkeypatch.setattr(caching, "VERSION", caching.VERSION + 1)
    cache(pair, *whole)
    assert len(entries(cache)) == len(settings) + 1


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize("damage", [cut, empty, flip, lengthen])
def test_damaged_cache_entry_is_rebuilt(
    pair: Pair, cache: SliceCache, damage, capsys: pytest.CaptureFixture[str]
) -> None:
    cache(pair, MM_WHS, POLICY, HU)
    damage(entries(cache)[0])
    for _ in range(2):
        assert_equal(cache(pair, MM_WHS, POLICY, HU), load_patient(pair, MM_WHS, POLICY, HU))
    assert capsys.readouterr().err.count("was damaged") == 1
    assert len(entries(cache)) == 1


def test_damaged_tissues_are_rebuilt_and_said(
    pair: Pair, cache: SliceCache, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = dataset.load_tissues(pair, MM_WHS, POLICY, HU, HU_CONTEXT)
    cache.tissues(pair, MM_WHS, POLICY, HU, HU_CONTEXT)
    flip(entries(cache)[0])
    for _ in range(2):
        tissues = cache.tissues(pair, MM_WHS, POLICY, HU, HU_CONTEXT)
        assert np.array_equal(tissues, expected)
    assert capsys.readouterr().err.count("was damaged") == 1


def test_processes_fill_one_folder_together(folder: Path, cache: SliceCache, root: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_cache import DataConfig, HU, MM_WHS, POLICY, SliceCache, find_pairs, load_cohort
print("ready", flush=True)
sys.stdin.readline()
print(load_cohort(find_pairs(Path(sys.argv[1])), DataConfig(), MM_WHS, POLICY, HU, SliceCache(Path(sys.argv[2]))).digest)
"""
    command = [sys.executable, "-c", code, str(folder), str(cache.folder)]
    processes = [
        subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    digests = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert {process.returncode for process in processes} == {0}
    assert digests == {load_cohort(find_pairs(folder), DataConfig(), MM_WHS, POLICY, HU).digest}
    assert len(entries(cache)) == 3 and all(map(caching.intact, entries(cache)))


def test_unwritable_cache_is_output_error(pair: Pair, tmp_path: Path) -> None:
    """A cache folder that cannot be written is an output error."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        SliceCache(tmp_path / "file" / "slices")(pair, MM_WHS, POLICY, HU)


@pytest.mark.slow
def test_command_caches_beside_the_run(cohort: Path, tmp_path: Path, command) -> None:
    """The command caches beside the run unless an option says otherwise."""
    tiny = [
        "data.canvas=[32,32]",
        "generator.filters=8",
        "generator.depth=4",
        "discriminator.filters=8",
        "discriminator.patch_size=8",
        "training.batch_size=2",
        "training.steps=0",
        "training.recalibrate=0",
        "training.valid_slices=4",
    ]
    digests = []
    for run, more in (
        ("beside", []),
        ("elsewhere", ["--cache", tmp_path / "mine"]),
        ("nowhere", ["--no-cache"]),
    ):
        folder = tmp_path / run / "run"
        arguments = [
            "--config",
            "train/configs/phantom.json",
            "--dataset-path",
            cohort,
            "--output",
            folder,
            "--quiet",
            *more,
        ]
        done = command("train/run.py", *arguments, "--set", *tiny)
        assert done.returncode == 0, done.stderr
        digests.append(json.loads((folder / "run.json").read_text())["data"]["digest"])
    assert len(set(digests)) == 1
    assert (
        len(list((tmp_path / "beside" / ".slices").iterdir()))
        == len(list((tmp_path / "mine").iterdir()))
        == 4
    )
    assert [p.name for p in (tmp_path / "nowhere").iterdir()] == ["run"]


def test_equal_pids_share_no_temporary_file(tmp_path: Path) -> None:
    """Writers with the same process number, as in containers on one disk, use two files."""
    assert temporary_name(tmp_path / "entry") != temporary_name(
        tmp_path / "entry"
    )  # containers on one disk are such
