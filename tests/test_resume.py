"""The journal: what a folder proves complete is kept, everything else is made again, and two
runs never share a folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import tracemalloc
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_masks import save, slices, structure_set
from samples import blobs, results, synth, write_mask

import runtime.batch.runner as stream_module
from runtime import OutputError, Synthesizer, UsageError
from runtime.__main__ import main
from runtime.batch.completion_log import JOURNAL, Entry, Journal
from runtime.batch.runner import CaseResult
from runtime.core.append_log import last_line, line_of
from runtime.core.console import run
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.io.cases import Case


def masks(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [write_mask(folder / f"{n}.nii.gz", blobs((8, 24, 24), seed=n)) for n in range(count)]


def stream(paths: list[Path], out: Path, **options: object) -> list[CaseResult]:
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        return sorted(
            opened.stream(paths, out, **options), key=lambda r: (r.case, r.variant or 0)
        )  # they come as they are done


def times(out: Path) -> dict[str, int]:
    return {name: (out / name).stat().st_mtime_ns for name in results(out)}


def test_resume_skips_all_and_reports_same(tmp_path: Path) -> None:
    """A second run with --resume makes nothing and reports the same."""
    paths, out = masks(tmp_path / "masks"), tmp_path / "out"
    first = stream(paths, out, variants=2)
    before = times(out)
    second = stream(paths, out, variants=2, resume=True)
    assert times(out) == before and all(r.skipped for r in second)
    assert [(r.case, r.variant, r.files, r.sha256, r.input, r.slices) for r in second] == [
        (r.case, r.variant, r.files, r.sha256, r.input, r.slices) for r in first
    ]


def test_without_resume_everything_is_remade(tmp_path: Path) -> None:
    paths, out = masks(tmp_path / "masks"), tmp_path / "out"
    stream(paths, out)
    before, bytes_before = times(out), results(out)
    assert not any(r.skipped for r in stream(paths, out))
    assert (
        all(times(out)[name] != time for name, time in before.items())
        and results(out) == bytes_before
    )


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone", "no journal"])
def test_resume_remakes_damaged_or_missing_results(damage: str, tmp_path: Path) -> None:
    """A result that was changed, cut or deleted, or is in no journal, is made again."""
    paths, out = masks(tmp_path / "masks"), tmp_path / "out"
    stream(paths, out)
    whole, victim = results(out), out / "1_ct.nii.gz"
    data = bytearray(victim.read_bytes())
    if damage == "flipped":
        data[-20] ^= 1
        victim.write_bytes(data)
    elif damage == "shorter":
        victim.write_bytes(data[:-30])
    elif damage == "gone":
        victim.unlink()
    else:
        (out / JOURNAL).unlink()
    again = stream(paths, out, resume=True)
    assert [r.skipped for r in again] == (
        [False] * 3 if damage == "no journal" else [True, False, True]
    )
    assert results(out) == whole


@pytest.mark.parametrize(
    ("format", "victim"),
    [("dicom", "1_v1/**/0003.dcm"), ("nnunet", "labelsTr/1_v1.nii.gz"), ("mha", "1_v1_ct.mha")],
)
def test_resume_checks_every_format_by_file(format: str, victim: str, tmp_path: Path) -> None:
    paths, out = masks(tmp_path / "masks"), tmp_path / "out"
    stream(paths, out, variants=2, format=format)
    whole = results(out)
    assert all(r.skipped for r in stream(paths, out, variants=2, format=format, resume=True))
    (path,) = out.glob(victim)
    path.unlink()
    again = stream(paths, out, variants=2, format=format, resume=True)
    assert [(r.case, r.variant) for r in again if not r.skipped] == [("1", 1)]
    assert results(out) == whole


@pytest.mark.parametrize("change", ["seed", "mask", "labels", "variants", "model"])
def test_resume_remakes_results_of_other_inputs(change: str, tmp_path: Path) -> None:
    """A result of another seed, mask, label map or model is made again."""
    paths, out, fresh = masks(tmp_path / "masks"), tmp_path / "out", tmp_path / "fresh"
    stream(paths, out, variants=2)
    options: dict[str, object] = {"variants": 2}
    if change == "seed":
        options["seed"] = 1
    elif change == "mask":
        write_mask(paths[1], blobs((8, 24, 24), seed=9))
    elif change == "labels":
        options["labels"] = {0: 0, None: 3}
    elif change == "variants":
        options["variants"] = 3
    manifest = fake_manifest(noise=change != "model")
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        resumed = list(opened.stream(paths, out, resume=True, **options))
        list(opened.stream(paths, fresh, **options))
    kept = {"mask": {"0", "2"}, "variants": {"0", "1", "2"}}.get(change, set())
    assert {r.case for r in resumed if r.skipped} == kept
    assert all(r.skipped == (r.variant != 2) for r in resumed) or change != "variants"
    assert results(out) == results(fresh)


def test_resume_survives_damaged_journal_line(tmp_path: Path) -> None:
    """A torn or altered line of the journal costs its own result alone."""
    paths, out = masks(tmp_path / "masks"), tmp_path / "out"
    stream(paths, out)
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    (out / JOURNAL).write_bytes(
        lines[0].replace(b'"slices": 8', b'"slices": 9') + lines[1] + lines[2][:-25]
    )
    assert [r.skipped for r in stream(paths, out, resume=True)] == [False, True, False]
    assert [r.skipped for r in stream(paths, out, resume=True)] == [
        True,
        True,
        True,
    ]  # the torn line did not swallow the next


def test_resume_retries_failed_mask(tmp_path: Path) -> None:
    paths, out = masks(tmp_path / "masks"), tmp_path / "out"
    good = paths[1].read_bytes()
    paths[1].write_bytes(good[:-40])
    assert [r.error is None for r in stream(paths, out)] == [True, False, True]
    paths[1].write_bytes(good)
    assert [(r.error, r.skipped) for r in stream(paths, out, resume=True)] == [
        (None, True),
        (None, False),
        (None, True),
    ]


def test_resume_results_independent_of_order(tmp_path: Path) -> None:
    """Results are the same in every order, and in two parts."""
    paths = masks(tmp_path / "masks", 4)
    stream(paths, tmp_path / "one", variants=2)
    stream(paths[2:], tmp_path / "two", variants=2)
    assert (
        sum(r.skipped for r in stream(paths[::-1], tmp_path / "two", variants=2, resume=True)) == 4
    )
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_resume_after_interrupt_with_complete_files(tmp_path: Path) -> None:
    """A run that stops half way leaves complete files and can go on."""
    paths, out = masks(tmp_path / "masks", 6), tmp_path / "out"
    manifest = fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        results_so_far = opened.stream(paths, out)
        next(results_so_far)
        results_so_far.close()  # type: ignore[attr-defined]
        assert not [p for p in out.iterdir() if p.name.startswith(".part")]
        list(opened.stream(paths, out, resume=True))
        list(opened.stream(paths, tmp_path / "whole"))
    assert results(out) == results(tmp_path / "whole")


def test_concurrent_run_in_folder_is_refused(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run in the same folder is refused until the first ends."""
    paths, out = masks(tmp_path / "masks"), tmp_path / "out"
    arguments = [
        "synth",
        *map(str, paths),
        "--model",
        str(fake_model),
        "--backend",
        "fake",
        "--output",
        str(out),
        "--quiet",
    ]
    out.mkdir()
    first = Journal(out)
    assert run(main, arguments) == 2
    assert "another run is writing into this folder" in capsys.readouterr().err
    assert results(out) == {}
    first.close()
    assert run(main, arguments) == 0
    assert len(results(out)) == 3


def test_removed_journal_holds_no_lock(tmp_path: Path) -> None:
    """Who waited for the lock on a file that is gone from the folder must not believe that it
    has the folder.
    """
    first = Journal(tmp_path)
    handle = os.open(
        tmp_path / JOURNAL, os.O_RDWR
    )  # what a second run holds when the first one ends
    first.close()
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second = Journal(tmp_path)
    with pytest.raises(UsageError, match="another run"):
        Journal(tmp_path)
    second.close()
    os.close(handle)
    assert not (tmp_path / JOURNAL).exists()


def test_journal_lists_results_without_paths(tmp_path: Path) -> None:
    """The journal says what was written and holds no path."""
    paths, out = masks(tmp_path / "masks", 1), tmp_path / "out"
    (result,) = stream(paths, out, variants=1)
    (line,) = (out / JOURNAL).read_text().splitlines()
    entry = json.loads(line.partition(" ")[2])
    assert (
        entry["result"] == "0_v0"
        and entry["files"] == dict(result.sha256)
        and len(entry["files"]) == 2
    )
    assert str(tmp_path) not in line


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_journal_is_reported(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("")
    (tmp_path / JOURNAL).chmod(0o400)
    with pytest.raises(OutputError):
        Journal(tmp_path)


def test_journal_entries_survive_reopening(tmp_path: Path) -> None:
    np.zeros(3).tofile(tmp_path / "file")
    from runtime.core.atomic_files import digest_of

    entry = Entry("a", "key", {"file": digest_of(tmp_path / "file")}, 3, ("said",))
    journal = Journal(tmp_path)
    journal.add(entry)
    journal.close()
    journal = Journal(tmp_path)
    assert (
        journal.find_complete("a", "key") == entry
        and journal.find_complete("a", "other") is None
        and journal.find_complete("b", "key") is None
    )
    journal.close()


def test_interrupt_closes_journal_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while the journal closes does not close anything twice."""
    journal, really = Journal(tmp_path), os.close

    def interrupted(handle: int) -> None:
        really(handle)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.close()
    monkeypatch.undo()
    journal.close()
    Journal(tmp_path).close()  # and the lock is let go


def test_resume_compares_like_image_by_content(tmp_path: Path, fake_model: Path) -> None:
    """Another image under the same name is another grid; the same image under another name is
    not.
    """
    series = slices(np.zeros((4, 20, 24), np.uint16), Modality="CT")
    square = np.array([[-10.0, 5, 42.5], [0, 5, 42.5], [0, 12, 42.5], [-10, 12, 42.5]])
    contours = structure_set(tmp_path / "rs.dcm", series, {"left ventricle": [square]})
    like, out = write_mask(tmp_path / "like.nii.gz", blobs((4, 20, 24))), tmp_path / "out"

    def made(image: Path) -> tuple[int, tuple[int, ...]]:
        assert synth(fake_model, out, contours, "--like", image, "--resume") == 0
        (ct,) = out.glob("*_ct.nii.gz")
        return ct.stat().st_mtime_ns, sitk.ReadImage(str(ct)).GetSize()

    first = made(like)
    assert first[1] == (24, 20, 4) and made(like) == first
    write_mask(like, blobs((5, 22, 26)))
    second = made(like)
    assert second[0] != first[0] and second[1] == (26, 22, 5)
    assert made(like.rename(tmp_path / "renamed.nii.gz")) == second
    folder = save(tmp_path / "series", slices(np.zeros((6, 20, 24), np.uint16), Modality="CT"))
    third = made(folder)
    assert third[1] == (24, 20, 6) and made(folder.rename(tmp_path / "moved")) == third


CUTS = {
    "nothing": lambda size: 0,
    "a byte": lambda size: 1,
    "its header": lambda size: min(100, size // 3),
    "half": lambda size: size // 2,
    "all but a byte": lambda size: size - 1,
}


@pytest.mark.parametrize("left", CUTS)
@pytest.mark.parametrize("format", ["nifti", "nii", "nrrd", "mha", "nnunet", "dicom"])
def test_resume_remakes_truncated_result(
    format: str, left: str, fake_model: Path, tmp_path: Path
) -> None:
    """Whatever a dying disk left of it, it is ours by the journal, and no other mask waits for
    it.
    """
    paths, out = masks(tmp_path / "masks", 2), tmp_path / "out"
    assert synth(fake_model, out, *paths, "--format", format) == 0
    whole = results(out)
    for name in [name for name in whole if "0" in Path(name).parts[0] or "/0" in name]:
        os.truncate(out / name, CUTS[left](len(whole[name])))
    missing = next(name for name in whole if name.startswith("1") or "/1" in name)
    (out / missing).unlink()
    assert synth(fake_model, out, *paths, "--format", format, "--resume") == 0
    assert results(out) == whole


@pytest.mark.parametrize("format", ["nifti", "dicom"])
def test_resume_refuses_foreign_result_file(format: str, fake_model: Path, tmp_path: Path) -> None:
    """A file that another program wrote is never taken for a cut result.

    Nor without the journal's word: whose an empty file is cannot be told.
    """
    (path,), out = masks(tmp_path / "masks", 1), tmp_path / "out"
    assert synth(fake_model, out, path, "--format", format) == 0
    victim = out / ("0_ct.nii.gz" if format == "nifti" else "0/0001.dcm")
    write_mask(tmp_path / "theirs.nii.gz", blobs((16, 64, 64)))
    victim.write_bytes(
        (tmp_path / "theirs.nii.gz").read_bytes() if format == "nifti" else bytes(20_000)
    )
    theirs = victim.read_bytes()
    assert (
        synth(fake_model, out, path, "--format", format, "--resume") == 2
        and victim.read_bytes() == theirs
    )
    (out / JOURNAL).unlink()
    victim.write_bytes(b"")
    assert (
        synth(fake_model, out, path, "--format", format, "--resume") == 2
        and victim.read_bytes() == b""
    )


@pytest.mark.parametrize("how", ["in place", "another file", "only its date"])
def test_mask_changed_while_read_fails(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its CT would be called made of what was digested.

    The change keeps size and date, as a copy with `-p` does.
    """
    paths, out = masks(tmp_path / "masks", 2), tmp_path / "out"
    really, other = (
        stream_module.read_case,
        write_mask(tmp_path / "other.nii", blobs((8, 24, 24), seed=7)),
    )
    paths[0] = write_mask(tmp_path / "masks" / "0.nii", blobs((8, 24, 24), seed=0))

    def read(case: Case, *more: Any) -> Any:
        if case.name == "0":
            state = paths[0].stat()
            if how == "in place":
                paths[0].write_bytes(other.read_bytes())
            elif how == "another file":
                os.replace(other, paths[0])
            os.utime(paths[0], ns=(state.st_atime_ns, state.st_mtime_ns + (how == "only its date")))
        return really(case, *more)

    monkeypatch.setattr(stream_module, "read_case", read)
    changed, good = stream(paths, out)
    assert good.error is None
    if how == "only its date":
        assert changed.error is None
    else:
        assert "0.nii changed while it was read" in str(changed.error) and {*results(out)} == {
            "1_ct.nii.gz"
        }


def test_zip_changed_while_read_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped, really = tmp_path / "z.zip", stream_module.read_case

    def pack(seed: int) -> None:
        write_mask(tmp_path / "a.nii", blobs((8, 24, 24), seed=seed))
        with zipfile.ZipFile(zipped, "w") as archive:
            archive.write(tmp_path / "a.nii", "a.nii")

    def read(case: Case, *more: Any) -> Any:
        pack(2)
        return really(case, *more)

    pack(1)
    monkeypatch.setattr(stream_module, "read_case", read)
    (result,) = stream([zipped], tmp_path / "out")
    assert "changed while it was read" in str(result.error)


def test_hole_in_journal_costs_little_memory(tmp_path: Path) -> None:
    """A crash of a file system may leave a hole of any size: the lines around it count."""
    facts = {"key": "k", "files": {"a": "0"}, "slices": 1, "warnings": []}
    with open(tmp_path / JOURNAL, "wb") as file:
        file.write(line_of({"result": "a", **facts}))
        file.seek(256 << 20, os.SEEK_CUR)
        file.write(b"\n" + line_of({"result": "b", **facts}))
    tracemalloc.start()
    with closing(Journal(tmp_path)) as journal:
        entries = [*journal.entries]
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entries == ["a", "b"]
    assert memory < 80 << 20


def test_last_line_of_hole_is_bounded(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as file:
        file.write(b"first\n")
        file.truncate(256 << 20)
    tracemalloc.start()
    with open(tmp_path / "log", "rb") as file:
        line, torn = last_line(file.fileno())
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torn and not line.strip(b"\0")
    assert memory < 80 << 20
