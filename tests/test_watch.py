"""A watched folder: what is complete is synthesized once, as `synth` synthesizes it, and moved
to done/ or failed/, whoever dies meanwhile.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from dicom_masks import save, segmentation, slices, structure_set
from samples import blobs, is_tidy, listed, mask2ct, results, synth, write_fake_model, write_mask

from runtime import Models
from runtime.__main__ import main
from runtime.batch.completion_log import Journal
from runtime.batch.plan import Plan
from runtime.core.console import run
from runtime.core.manifest import Label, LabelTable
from runtime.engines.fake import fake_manifest
from runtime.io.case_finding import find_cases
from runtime.service.watch_folder import FolderWatcher
from runtime.service.work_queue import DONE, FAILED, LOCK, WORK, Inbox

KILLS = 20


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def arguments(model: Path, inbox: Path, out: Path, *more: object) -> list[str]:
    return [
        "watch",
        str(inbox),
        "--model",
        str(model),
        "--backend",
        "fake",
        "--output",
        str(out),
        "--stable",
        "0",
        "--poll",
        "0.01",
        *map(str, more),
    ]


def watch(model: Path, inbox: Path, out: Path, *more: object) -> int:
    return run(main, arguments(model, inbox, out, "--once", *more))


def hospital(folder: Path, name: str = "left ventricle", code: str = "87878005") -> Path:
    """A series with a segmentation of it, in a folder and in files that name a patient."""
    drawn = slices(np.zeros((6, 20, 24), np.int16), Modality="CT")
    save(folder / "CT", drawn)
    segmentation(
        folder / "SEG" / "Doe_John_Planted.dcm",
        drawn,
        (blobs((6, 20, 24), (0, 1))).astype(np.uint8),
        [(name, code)],
    )
    return folder


def test_watch_results_equal_synth_results(
    fake_model: Path, inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is put in becomes what synth makes of it.

    A file, a zip, a folder with a series and its segmentation, a folder of volumes: each ends
    in done/ as it came.
    """
    hospital(inbox / "Doe^John^Planted")
    write_mask(inbox / "a.nii.gz", blobs(seed=1))
    write_mask(tmp_path / "b.nrrd", blobs(seed=2))
    with zipfile.ZipFile(inbox / "some.zip", "w") as archive:
        archive.write(tmp_path / "b.nrrd", "b.nrrd")
    (inbox / "two").mkdir()
    write_mask(inbox / "two" / "c.mha", blobs(seed=3))
    write_mask(inbox / "two" / "d.nii", blobs(seed=4))
    given, items = results(inbox), sorted(inbox.iterdir())
    assert synth(fake_model, tmp_path / "expected", *items, "--variants", "2", "--seed", "5") == 0
    assert watch(fake_model, inbox, tmp_path / "out", "--variants", "2", "--seed", "5") == 0
    assert (
        results(tmp_path / "out") == results(tmp_path / "expected")
        and len(results(tmp_path / "out")) == 5 * 4
    )
    assert results(inbox / DONE) == given and is_tidy(inbox) and not (inbox / FAILED).exists()
    said = capsys.readouterr()
    assert "a.nii.gz: done" in said.out and "4 done, 0 failed" in said.out
    assert not [
        word for word in ("Doe", "John", "Planted", "PLANTED") if word in said.out + said.err
    ]


def test_watch_bad_input_fails_with_reason(
    fake_model: Path, inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Input that cannot be used lies in failed/ with its reason and stops no other."""
    good = write_mask(inbox / "good.nii.gz").read_bytes()
    (inbox / "cut.nii.gz").write_bytes(good[:-40])
    (inbox / "notes.txt").write_text("for you")
    write_mask(inbox / "unknown.nii.gz", blobs(values=(0, 7)))
    hospital(inbox / "Doe^John^Planted", "liver", "10200004")
    save(inbox, slices(blobs((1, 20, 24))), "Doe_John")  # one slice of a label series
    (inbox / "cut.zip").write_bytes(b"PK")
    (inbox / "lock").write_bytes(b"what claims are locked by is not called that")
    assert watch(fake_model, inbox, tmp_path / "out") == 1
    assert (
        listed(inbox / DONE) == {"good.nii.gz"}
        and {*results(tmp_path / "out")} == {"good_ct.nii.gz"}
        and is_tidy(inbox)
    )
    items = {
        "cut.nii.gz",
        "notes.txt",
        "unknown.nii.gz",
        "Doe^John^Planted",
        "Doe_John_000_000.dcm",
        "cut.zip",
        "lock",
    }
    assert listed(inbox / FAILED) == items | {f"{name}.reason.txt" for name in items}
    reasons = {name: (inbox / FAILED / f"{name}.reason.txt").read_text() for name in items}
    assert (
        "truncated" in reasons["cut.nii.gz"]
        and "holds 7" in reasons["unknown.nii.gz"]
        and "holds 1 (SCT:10200004)" in reasons["Doe^John^Planted"]
    )
    assert (
        "one image of a series" in reasons["Doe_John_000_000.dcm"]
        and "into a folder" in reasons["Doe_John_000_000.dcm"]
    )
    everything = "".join([*reasons.values(), *capsys.readouterr()])
    assert not [
        word
        for word in ("Doe", "John", "lanted", "PLANTED", WORK, str(inbox))
        if word in everything
    ]
    assert all("remedy" in text and len(text.splitlines()) < 12 for text in reasons.values())


def test_watch_reason_hides_zip_member_name(
    fake_model: Path, inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason does not call a damaged file in a zip by its name."""
    folder, zipped = hospital(tmp_path / "one"), inbox / "a.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for file in sorted(folder.rglob("*.dcm")):
            archive.write(file, file.relative_to(folder))
    with zipfile.ZipFile(zipped) as archive:
        last = archive.infolist()[-1]
        assert "Planted" in last.filename
        end = last.header_offset + 30 + len(last.filename) + last.compress_size
    content = bytearray(zipped.read_bytes())
    content[end - 1] ^= 255
    zipped.write_bytes(content)
    assert (
        synth(fake_model, tmp_path / "out", zipped)
        == watch(fake_model, inbox, tmp_path / "out")
        == 1
    )
    said = "".join([*capsys.readouterr(), (inbox / FAILED / "a.zip.reason.txt").read_text()])
    assert said.count("cannot be unpacked (BadZipFile)") == 3 and "Planted" not in said


def test_watch_reason_hides_duplicate_segmentation_names(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One segmentation in two folders is not called by the names of its files."""
    folder = hospital(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    assert synth(fake_model, tmp_path / "out", folder, tmp_path / "two") == 2
    said = capsys.readouterr().err
    assert (
        "would both be written as seg-" in said
        and "leave one out" in said
        and "Planted" not in said
    )


def test_watch_survives_names_without_utf8(
    fake_model: Path, inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that are not UTF-8 end no watcher and stand in no message.

    As old shares have them.

    A volume of such a name is refused, for its result would be called so.
    """
    name = os.fsdecode(b"Planted_M\xfcller")
    hospital(inbox / name)
    (inbox / f"{name}_2").mkdir()
    for path in (inbox / f"{name}_2" / "a.nii.gz", inbox / os.fsdecode(b"h\xfcfte.nii.gz")):
        write_mask(tmp_path / "mask.nii.gz").rename(path)
    assert watch(fake_model, inbox, tmp_path / "out") == 1
    assert listed(inbox / DONE) == {name} and is_tidy(inbox)
    reasons = [file.read_text() for file in (inbox / FAILED).glob("*.reason.txt")]
    said = "".join([*reasons, *capsys.readouterr()])
    assert len(reasons) == 2 and all("not valid UTF-8" in text for text in reasons)
    assert "Planted" not in said and WORK not in said


def test_watch_numbers_repeated_names(fake_model: Path, inbox: Path, tmp_path: Path) -> None:
    """A repeated name is numbered, and no result is replaced by another mask's."""
    out, first = tmp_path / "out", blobs(seed=1)
    write_mask(inbox / "a.nii.gz", first)
    assert watch(fake_model, inbox, out) == 0
    whole, written = results(out), (out / "a_ct.nii.gz").stat().st_mtime_ns
    write_mask(inbox / "a.nii.gz", first)
    assert watch(fake_model, inbox, out) == 0  # the same once more: it is validated to be there
    for _ in range(2):
        write_mask(inbox / "a.nii.gz", blobs(seed=2))
        assert watch(fake_model, inbox, out) == 1
    assert listed(inbox / DONE) == {"a.nii.gz", "a-2.nii.gz"}
    assert listed(inbox / FAILED) == {
        "a.nii.gz",
        "a.nii.gz.reason.txt",
        "a-2.nii.gz",
        "a-2.nii.gz.reason.txt",
    }
    assert (
        "the output folder holds a, made of another mask"
        in (inbox / FAILED / "a-2.nii.gz.reason.txt").read_text()
    )
    assert results(out) == whole and (out / "a_ct.nii.gz").stat().st_mtime_ns == written
    (out / "a_ct.nii.gz").rename(tmp_path / "taken away")  # by whoever uses it
    write_mask(inbox / "a.nii.gz", blobs(seed=2))
    assert watch(fake_model, inbox, out) == 0
    assert (
        listed(inbox / DONE) == {"a.nii.gz", "a-2.nii.gz", "a-3.nii.gz"} and results(out) != whole
    )


def test_watch_remakes_claims_of_other_options(
    fake_model: Path, inbox: Path, tmp_path: Path
) -> None:
    """Work that was claimed under other options is made again under the present ones.

    A watcher died behind the first of two variants, and its successor was started with
    another seed.
    """
    out, mask = tmp_path / "out", write_mask(inbox / "a.nii.gz")
    assert (
        synth(fake_model, out, mask, "--variants", "1")
        == synth(fake_model, tmp_path / "expected", mask, "--variants", "2", "--seed", "1")
        == 0
    )
    assert watch(fake_model, inbox, out, "--variants", "2", "--seed", "1") == 0
    assert results(out) == results(tmp_path / "expected")


def test_watch_indexes_dataset_of_killed_watcher(
    fake_model: Path, inbox: Path, tmp_path: Path
) -> None:
    """A watcher indexes the data set that a killed one did not come to index."""
    index = tmp_path / "out" / "dataset.json"
    for n in range(2):
        write_mask(inbox / f"{n}.nii.gz", blobs(seed=n))
    assert watch(fake_model, inbox, tmp_path / "out", "--format", "nnunet") == 0
    whole = index.read_text()
    assert '"numTraining": 2' in whole
    index.write_text(whole.replace('"numTraining": 2', '"numTraining": 1'))
    assert watch(fake_model, inbox, tmp_path / "out", "--format", "nnunet") == 0
    assert index.read_text() == whole


def test_watch_keeps_equal_mask_names_apart(fake_model: Path, inbox: Path, tmp_path: Path) -> None:
    """Folders with masks of one name do not mix: the first is done, the others fail."""
    for n in range(3):
        (inbox / f"p{n}").mkdir()
        write_mask(inbox / f"p{n}" / "mask.nii.gz", blobs(seed=n))
    assert watch(fake_model, inbox, tmp_path / "out") == 1
    (done,) = listed(inbox / DONE)
    assert synth(fake_model, tmp_path / "expected", inbox / DONE / done) == 0
    assert (
        results(tmp_path / "out") == results(tmp_path / "expected")
        and len(listed(inbox / FAILED)) == 4
    )


def test_watch_routes_masks_by_labels(
    inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks go to the model that knows their labels."""
    heart = write_fake_model(tmp_path / "heart", fake_manifest())
    liver = write_fake_model(
        tmp_path / "liver",
        fake_manifest(LabelTable((Label("background", 0), Label("liver", 6))), noise=False),
    )
    write_mask(inbox / "a.nii.gz", blobs(values=(0, 205)))
    write_mask(inbox / "b.nii.gz", blobs(values=(0, 6)))
    write_mask(inbox / "c.nii.gz", blobs(values=(0, 7)))
    given = {path.name: path.read_bytes() for path in inbox.iterdir()}
    assert watch(heart, inbox, tmp_path / "out", "--model", liver) == 1
    assert "b.nii.gz: liver (its labels: 0, 6)" in capsys.readouterr().out
    for name, model in {"a.nii.gz": heart, "b.nii.gz": liver}.items():
        assert (inbox / DONE / name).read_bytes() == given[name]
        assert synth(model, tmp_path / "expected", inbox / DONE / name) == 0
    assert results(tmp_path / "out") == results(tmp_path / "expected")
    assert "fits no model" in (inbox / FAILED / "c.nii.gz.reason.txt").read_text()


def test_watch_leaves_unfinished_writes_alone(
    fake_model: Path, inbox: Path, tmp_path: Path
) -> None:
    whole = write_mask(inbox / "a.nii.gz").read_bytes()
    (inbox / "mac").mkdir()
    for name in ("a.nii.gz", ".DS_Store", "._a.nii.gz"):
        (inbox / "mac" / name.replace("a.nii", "m.nii")).write_bytes(whole)
    for name in ("b.nii.gz.part", ".c.nii.gz", "d.nii.gz.TMP", "e.nii.gz.filepart", "f.nii.gz~"):
        (inbox / name).write_bytes(whole)
    (inbox / "series").mkdir()
    (inbox / "series" / "a.nii").write_bytes(whole)
    (inbox / "series" / "b.nii.part").write_bytes(whole)
    (inbox / "empty").mkdir()
    assert watch(fake_model, inbox, tmp_path / "out") == 0
    assert listed(inbox / DONE) == {"a.nii.gz", "mac"} and len(listed(inbox)) == 2 + 7


def test_watch_damaged_series_waits_then_fails(
    fake_model: Path, inbox: Path, tmp_path: Path
) -> None:
    folder = save(inbox / "study", slices(blobs((6, 20, 24))))
    victim = sorted(folder.iterdir())[-1]
    content = victim.read_bytes()
    victim.write_bytes(b"")
    out = tmp_path / "out"
    assert watch(fake_model, inbox, out) == 1
    assert listed(inbox / FAILED) == {"study", "study.reason.txt"} and not list(
        out.glob("*.nii.gz")
    )
    assert "1 cannot be read (1 empty)" in (inbox / FAILED / "study.reason.txt").read_text()
    again = shutil.move(inbox / FAILED / "study", inbox / "study")
    (Path(again) / victim.name).write_bytes(content)
    assert watch(fake_model, inbox, out) == 0
    assert listed(inbox / DONE) == {"study"} and len(list(out.glob("series-*_ct.nii.gz"))) == 1


@pytest.mark.parametrize(
    ("lacking", "ends_in", "seconds"),
    [
        ("nothing", DONE, 5),
        ("an empty slice", FAILED, 50),
        ("a slice that contours name", FAILED, 50),
        ("the first slice", DONE, 50),
    ],
)
def test_watch_waits_for_missing_files(
    lacking: str,
    ends_in: str,
    seconds: int,
    fake_model: Path,
    inbox: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten times as long as what is whole, by a clock that the test moves on."""
    clock = [0.0]
    monkeypatch.setattr("runtime.service.work_queue.time.monotonic", lambda: clock[0])
    series = slices(blobs((6, 20, 24)), Modality="CT")
    folder = save(inbox / "study", series)
    first, *_, last = sorted(folder.iterdir(), key=lambda file: file.name[-7:])
    if lacking == "the first slice":
        first.unlink()
    elif lacking == "an empty slice":
        last.write_bytes(b"")
    elif lacking == "a slice that contours name":
        last.unlink()
        structure_set(
            folder / "rs.dcm",
            series,
            {"left ventricle": [np.array([[-10.0, 5, 45], [0, 5, 45], [0, 12, 45]])]},
        )
    with Models.open([str(fake_model)], backend="fake") as models:
        plans = {name: Plan(tmp_path / "out") for name in models}
        watcher = FolderWatcher(
            inbox,
            models,
            plans,
            find=lambda path, say: find_cases([path]),
            stable=5,
            listener=Told(),
        )
        for now in (0, seconds - 0.1):
            clock[0] = now
            assert not watcher.step() and folder.exists()
        clock[0] = seconds
        assert watcher.step() and (inbox / ends_in / "study").exists()


def test_watch_takes_over_dead_watchers_claims(
    fake_model: Path, inbox: Path, tmp_path: Path
) -> None:
    """A watcher for the same output takes up what a dead watcher claimed."""
    given = {
        name: write_mask(inbox / f"{name}.nii.gz", blobs(seed=n)).read_bytes()
        for n, name in enumerate("abc")
    }
    dead, other = (
        Inbox(inbox, tmp_path / out, stable=0, is_complete=lambda path: True)
        for out in ("out", "other")
    )
    first, second, third = dead.look()
    left, alive = dead.claim(first), dead.claim(second)
    other.look()
    elsewhere = other.claim(third)
    assert left and alive and elsewhere
    dead.leave(left)  # as the kernel does when its process ends
    other.leave(elsewhere)
    assert watch(fake_model, inbox, tmp_path / "out") == 0
    assert (
        results(inbox / DONE) == {"a.nii.gz": given["a"]}
        and alive.item.exists()
        and elsewhere.item.exists()
    )
    dead.leave(alive)
    assert (
        watch(fake_model, inbox, tmp_path / "out")
        == watch(fake_model, inbox, tmp_path / "other")
        == 0
    )
    assert {*results(inbox / DONE)} == {"a.nii.gz", "b.nii.gz", "c.nii.gz"} and is_tidy(inbox)
    assert {*results(tmp_path / "out")} == {"a_ct.nii.gz", "b_ct.nii.gz"} and {
        *results(tmp_path / "other")
    } == {"c_ct.nii.gz"}


@pytest.mark.skipif(os.name != "posix", reason="pipes with names")
def test_watch_pipes_and_links_fail(fake_model: Path, inbox: Path, tmp_path: Path) -> None:
    """Neither holds up the good mask, and nothing outside the item is read."""
    secret = write_mask(tmp_path / "secret.nii.gz")
    good = write_mask(inbox / "good.nii.gz").read_bytes()
    os.mkfifo(inbox / "pipe.nii")
    (inbox / "link.nii.gz").symlink_to(secret)
    (inbox / "broken.nii.gz").symlink_to("nowhere")
    (inbox / "folder").mkdir()
    write_mask(inbox / "folder" / "a.nii.gz")
    (inbox / "folder" / "b.nii.gz").symlink_to(secret)
    assert watch(fake_model, inbox, tmp_path / "out") == 1
    assert results(inbox / DONE) == {"good.nii.gz": good} and {*results(tmp_path / "out")} == {
        "good_ct.nii.gz"
    }
    items = {"pipe.nii", "link.nii.gz", "broken.nii.gz", "folder"}
    assert listed(inbox / FAILED) == items | {f"{name}.reason.txt" for name in items} and is_tidy(
        inbox
    )
    assert all(
        "is not opened" in (inbox / FAILED / f"{name}.reason.txt").read_text() for name in items
    )
    assert secret.is_file()


class Told:
    """What a listener was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: self.calls.append(name)


def test_watch_claims_nothing_while_output_locked(
    fake_model: Path, inbox: Path, tmp_path: Path
) -> None:
    """While another run writes into the output folder, nothing is claimed."""
    write_mask(inbox / "a.nii.gz")
    out, told = tmp_path / "out", Told()
    with Models.open([fake_model], backend="fake") as models:
        watcher = FolderWatcher(
            inbox,
            models,
            {name: Plan(out) for name in models},
            find=lambda path, say: find_cases([path]),
            stable=0,
            listener=told,
        )
        another = Journal(out)
        assert not watcher.step() and told.calls == ["waiting"] and listed(inbox) == {"a.nii.gz"}
        another.close()
        assert (
            watcher.step()
            and told.calls[1:] == ["chosen", "result_ready", "settled"]
            and listed(inbox / DONE) == {"a.nii.gz"}
        )


@pytest.mark.parametrize("wrong", ["no inbox", "output in it", "output is it"])
def test_watch_refuses_impossible_folders(
    wrong: str, fake_model: Path, inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mask(inbox / "a.nii.gz")
    where = {
        "no inbox": (tmp_path / "none", tmp_path / "out"),
        "output in it": (inbox, inbox / "out"),
        "output is it": (inbox, inbox),
    }[wrong]
    assert watch(fake_model, *where) == 2
    assert "remedy" in capsys.readouterr().err and listed(inbox) == {"a.nii.gz"}


@pytest.fixture(scope="module")
def start(fake_model: Path) -> Iterator[Callable[[Path, Path], BaseProcess]]:
    """Start `watch` in a process forked from one that has imported everything."""
    started: list[BaseProcess] = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["samples", "isal.igzip_threaded", "runtime.io.readers.volume"])

    def start(inbox: Path, out: Path) -> BaseProcess:
        process = context.Process(
            target=mask2ct, args=(arguments(fake_model, inbox, out, "--variants", "2", "--quiet"),)
        )
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:  # those of a test that failed
        process.kill()


def wait_until(true: Callable[[], object], *processes: BaseProcess, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        processes[0].join(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [("out", "out"), ("one", "two")])
def test_watch_two_watchers_survive_repeated_kills(
    outputs: tuple[str, str],
    start: Callable[[Path, Path], BaseProcess],
    fake_model: Path,
    inbox: Path,
    tmp_path: Path,
) -> None:
    """Two watchers that are killed twenty times lose nothing and double nothing.

    With one output folder, where they take turns, and with two.

    New masks come while they are killed.
    """
    when, given = random.Random(0), {}
    for n in range(24):
        path = write_mask(
            tmp_path / f"case{n}.nii.gz", blobs((16, 96, 96), seed=n), spacing=(1.0, 1.0, 2.0)
        )
        given[path.name] = path.read_bytes()
    assert (
        synth(
            fake_model,
            tmp_path / "expected",
            *(tmp_path / name for name in given),
            "--variants",
            "2",
        )
        == 0
    )
    coming, places = [*given], [tmp_path / out for out in outputs]
    watchers = [start(inbox, place) for place in places]
    halfway = 0
    for _ in range(KILLS):
        for name in coming[:1]:
            os.rename(tmp_path / name, inbox / name)
            coming.remove(name)
        victim = when.randrange(2)
        watchers[victim].join(when.uniform(0.0, 0.4))
        watchers[victim].kill()
        watchers[victim].join()
        assert watchers[victim].exitcode == -signal.SIGKILL
        halfway += bool([path for path in (inbox / WORK).glob("*/*") if path.name != LOCK])
        watchers[victim] = start(inbox, places[victim])
    for name in coming:
        os.rename(tmp_path / name, inbox / name)
    wait_until(
        lambda: (
            len([*listed(inbox / DONE), *listed(inbox / FAILED)]) >= len(given) and is_tidy(inbox)
        ),
        *watchers,
    )
    for watcher in watchers:
        os.kill(watcher.pid or 0, signal.SIGTERM)
        watcher.join(5)
        assert watcher.exitcode == 130
    assert halfway >= KILLS // 4  # or the moments were not in the work
    assert results(inbox / DONE) == given and not (inbox / FAILED).exists()
    made = [results(place) for place in sorted({*places})]
    assert sum(map(len, made)) == len(given) * 4  # nothing twice
    assert {name: data for one in made for name, data in one.items()} == results(
        tmp_path / "expected"
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_stops_at_once_and_continues(
    number: signal.Signals,
    start: Callable[[Path, Path], BaseProcess],
    fake_model: Path,
    inbox: Path,
    tmp_path: Path,
) -> None:
    """A stopped watcher ends at once, and its work goes on in the next."""
    out = tmp_path / "out"
    masks = [
        write_mask(
            tmp_path / f"case{n}.nii.gz", blobs((16, 96, 96), seed=n), spacing=(1.0, 1.0, 2.0)
        )
        for n in range(8)
    ]
    assert synth(fake_model, tmp_path / "expected", *masks, "--variants", "2") == 0
    for mask in masks:
        os.rename(mask, inbox / mask.name)
    watcher = start(inbox, out)
    wait_until(lambda: listed(inbox / DONE), watcher)
    os.kill(watcher.pid or 0, number)
    watcher.join(5)
    assert watcher.exitcode == 130
    assert not [
        name for name in results(out) if Path(name).name.startswith(".")
    ]  # nothing half-written
    assert watch(fake_model, inbox, out, "--variants", "2") == 0
    assert (
        results(out) == results(tmp_path / "expected")
        and len(listed(inbox / DONE)) == 8
        and is_tidy(inbox)
    )


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_watch_refuses_folder_of_links(fake_model: Path, inbox: Path, tmp_path: Path) -> None:
    """It would lie there for ever, and nothing would be said."""
    (tmp_path / "elsewhere").mkdir()
    (inbox / "case").mkdir()
    (inbox / "case" / "linked").symlink_to(tmp_path / "elsewhere")
    assert watch(fake_model, inbox, tmp_path / "out") == 1
    assert "is not opened" in (inbox / FAILED / "case.reason.txt").read_text()
