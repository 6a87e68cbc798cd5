"""The audit file: which model made what of which mask, in lines that show when one was removed
or altered.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nodes import QUIETLY, SECRETS, Serving, archive, push, settled, until, write_study
from samples import blobs, results, synth, write_mask
from test_watch import arguments, hospital, watch

from runtime import Models
from runtime.__main__ import main
from runtime.batch.audit_check import BrokenChain, check_audit
from runtime.batch.audit_log import AUDIT, AuditFile, AuditTrail
from runtime.batch.completion_log import Journal
from runtime.batch.plan import Plan
from runtime.batch.runner import CaseResult
from runtime.core.console import run
from runtime.io.case_finding import find_cases
from runtime.service.watch_folder import FolderWatcher


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def of(action: str, file: Path) -> list[dict[str, Any]]:
    return [line for line in lines(file) if line["action"] == action]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def chain(path: Path, count: int) -> list[bytes]:
    file = AuditFile(path)
    for n in range(count):
        file.add("received", item=f"{n}.nii.gz")
    return path.read_bytes().splitlines(keepends=True)


def test_each_result_has_a_line(
    model: Path, inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the digests of the mask, the model and the output, and the same in the log."""
    mask = sha256(write_mask(inbox / "a.nii.gz", blobs((4, 24, 24))))
    (inbox / "b.nii.gz").write_bytes(b"no volume")
    assert watch(model, inbox, tmp_path / "out", "--backend", "onnx", "--seed", "7") == 1
    file = tmp_path / "out" / AUDIT
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    actions = [line["action"] for line in lines(file)]
    assert actions[:2] == ["started", "model loaded"] and actions[-1] == "stopped"
    assert sorted(actions[2:-1]) == ["failed", "received", "received", "synthesized"]
    (line,) = of("synthesized", file)
    journal = Journal(tmp_path / "out")
    entry = journal.entries["a"]
    journal.close()
    assert line["mask_sha256"] == entry.mask and mask not in file.read_text()
    assert (
        line["files"] == dict(entry.files) == {"a_ct.nii.gz": sha256(tmp_path / "out/a_ct.nii.gz")}
    )
    assert line["manifest_sha256"] == sha256(model / "manifest.json")
    assert line["model_sha256"] == sha256(model / line["model_file"])
    assert (line["case"], line["seed"], line["variant"], line["precision"]) == (
        "a",
        7,
        None,
        "fp32",
    )
    assert line["engine"].startswith("onnxruntime") and {*line["seconds"]} == {
        "read",
        "synthesize",
        "write",
    }
    assert of("failed", file)[0]["error"] == "UnreadableVolume"
    (told,) = [row for row in capsys.readouterr().out.splitlines() if " synthesized " in row]
    for key in (
        "case",
        "mask_sha256",
        "seed",
        "manifest_sha256",
        "model_sha256",
        "file_list_sha256",
    ):
        assert f" {key}={line[key]}" in told


def test_digest_of_the_file_list(fake_model: Path, tmp_path: Path) -> None:
    """It is called what it is, and can be computed from `files` alone."""
    mask, file = write_mask(tmp_path / "a.nii.gz"), tmp_path / "audit.jsonl"
    assert synth(fake_model, tmp_path / "out", mask, "--variants", "2", "--audit", str(file)) == 0
    for line in of("synthesized", file):
        listed = json.dumps(line["files"], sort_keys=True).encode()
        assert len(line["files"]) == 2 and "output_sha256" not in line
        assert line["file_list_sha256"] == hashlib.sha256(listed).hexdigest()


def test_older_audit_lines_are_read(fake_model: Path, tmp_path: Path) -> None:
    mask, file = write_mask(tmp_path / "a.nii.gz"), tmp_path / "audit.jsonl"
    older = {
        "model_name": "a",
        "manifest_sha256": "a" * 64,
        "model_sha256": "",
        "output_sha256": "b" * 64,
    }
    AuditFile(file).add("synthesized", **older)
    assert synth(fake_model, tmp_path / "out", mask, "--audit", str(file)) == 0
    summary = check_audit([file])
    assert summary.actions["synthesized"] == 2 and summary.models["a", "a" * 64, ""] == 1


def test_what_is_complete_is_skipped(fake_model: Path, inbox: Path, tmp_path: Path) -> None:
    mask = write_mask(tmp_path / "a.nii.gz").read_bytes()
    for _ in range(2):
        (inbox / "a.nii.gz").write_bytes(mask)
        assert watch(fake_model, inbox, tmp_path / "out") == 0
    (first,), (again,) = (
        of("synthesized", tmp_path / "out" / AUDIT),
        of("skipped", tmp_path / "out" / AUDIT),
    )
    assert first["files"] == again["files"] and first["mask_sha256"] == again["mask_sha256"]
    assert first["process"] != again["process"]


def test_audit_line_precedes_result_event(fake_model: Path, inbox: Path, tmp_path: Path) -> None:
    """The audit line is written before a listener hears of the result."""
    write_mask(inbox / "a.nii.gz")
    file = tmp_path / "out" / AUDIT
    seen: list[int] = []

    class Listener:
        def result_ready(self, result: CaseResult) -> None:
            seen.append(len(of("synthesized", file)))

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    with Models.open([fake_model], backend="fake") as models:
        plans = {name: Plan(tmp_path / "out") for name in models}
        trail = AuditTrail(file, "watch")
        FolderWatcher(
            inbox,
            models,
            plans,
            find=lambda path, say: find_cases([path]),
            stable=0,
            listener=Listener(),
            audit=trail,
        ).run(poll=0, once=True)
    assert seen == [1]


def test_audit_omits_dicom_source_words(fake_model: Path, inbox: Path, tmp_path: Path) -> None:
    hospital(inbox / "Doe^John^Planted")
    hospital(inbox / "Roe^Planted", "liver", "10200004")
    write_mask(tmp_path / "c.nrrd", blobs(seed=2))
    with zipfile.ZipFile(inbox / "Doe_John.zip", "w") as file:
        file.write(tmp_path / "c.nrrd", "c.nrrd")
    assert watch(fake_model, inbox, tmp_path / "out", "--format", "dicom") == 1
    text = (tmp_path / "out" / AUDIT).read_text()
    assert not [word for word in (*SECRETS, "John", "liver", str(tmp_path)) if word in text]
    assert len(of("synthesized", tmp_path / "out" / AUDIT)) == 2


ATTACKS: dict[str, tuple[Callable[[list[bytes]], list[bytes]], int]] = {
    "a line removed": (lambda rows: rows[:2] + rows[3:], 3),
    "a line altered": (lambda rows: [*rows[:2], rows[2].replace(b"2.nii", b"9.nii"), *rows[3:]], 4),
    "two lines swapped": (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], 2),
    "the beginning removed": (lambda rows: rows[2:], 1),
    "a line added": (lambda rows: [*rows[:2], rows[1], *rows[2:]], 3),
    "a line made unreadable": (lambda rows: [*rows[:2], b"gone\n", *rows[3:]], 3),
    "the last line made unreadable": (lambda rows: [*rows[:-1], b"gone\n"], 5),
    "another file in front": (lambda rows: rows + rows, 6),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_broken_audit_chain_is_reported(
    attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, number = ATTACKS[attack]
    rows = chain(tmp_path / "audit.jsonl", 5)
    assert run(main, ["audit", str(tmp_path / "audit.jsonl")]) == 0
    (tmp_path / "audit.jsonl").write_bytes(b"".join(change(rows)))
    capsys.readouterr()
    assert run(main, ["audit", str(tmp_path / "audit.jsonl")]) == 1
    assert capsys.readouterr().err.startswith(f"error: line {number} breaks the chain")


def test_noted_digest_reveals_truncated_audit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that were cut off the end show by a digest that was noted before."""
    rows = chain(tmp_path / "audit.jsonl", 5)
    noted = check_audit([tmp_path / "audit.jsonl"]).last
    assert noted == hashlib.sha256(rows[-1].rstrip()).hexdigest()
    line = ["audit", str(tmp_path / "audit.jsonl"), "--holds", noted]
    assert run(main, line) == 0
    (tmp_path / "audit.jsonl").write_bytes(b"".join(rows[:-1]))
    assert run(main, line) == 1 and "was noted" in capsys.readouterr().err


@pytest.mark.parametrize("left", [1, 40, -1])
def test_torn_audit_line_is_reported(
    left: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that lacks its newline alone. What lies there is never rewritten."""
    file = tmp_path / "audit.jsonl"
    rows = chain(file, 3)
    torn = b"".join(rows[:2]) + rows[2][:left]
    file.write_bytes(torn)
    assert run(main, ["audit", str(file)]) == 0 and "at the end" in capsys.readouterr().out
    AuditFile(file).add("received", item="next.nii.gz")
    assert file.read_bytes().startswith(torn + b"\n")
    assert json.loads(file.read_bytes().splitlines()[-1])["torn"] == len(rows[2][:left])
    assert (
        run(main, ["audit", str(file)]) == 0
        and "stated by the next line" in capsys.readouterr().out
    )
    file.write_bytes(file.read_bytes().replace(rows[2][:left] + b"\n", b"", 1))
    assert run(main, ["audit", str(file)]) == 1


def test_a_full_disk_tears_one_line(tmp_path: Path) -> None:
    """The file may grow by some bytes alone, as the system holds it: the line is torn, told, and
    the next one whole.
    """
    import resource

    file = tmp_path / "audit.jsonl"
    chain(file, 2)

    def child() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 30,) * 2)
        try:
            AuditFile(file).add("received", item="x")
        except Exception as exc:
            os._exit(4 if type(exc).__name__ == "OutputError" else 1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 4 and check_audit([file]).torn == 30
    AuditFile(file).add("received", item="y")
    assert check_audit([file]).torn_before == 1


def test_a_renamed_file_is_continued(tmp_path: Path) -> None:
    """By the process that wrote it, by another one after it, and whatever else rotation left
    there.
    """
    file, writer = tmp_path / "audit.jsonl", AuditFile(tmp_path / "audit.jsonl")
    writer.add("started", command="watch")
    file.rename(tmp_path / "audit.jsonl.2")
    writer.add("received", item="a.nii.gz")
    file.rename(tmp_path / "audit.jsonl.1")
    (tmp_path / "audit.jsonl.0.gz").write_bytes(b"compressed")
    AuditFile(file).add("started", command="watch")
    parts = [tmp_path / "audit.jsonl.2", tmp_path / "audit.jsonl.1", file]
    assert [lines(part)[0]["begins"] for part in parts] == [
        "a chain",
        "after rotation",
        "after rotation",
    ]
    summary = check_audit(parts)
    assert (summary.lines, summary.continues) == (3, "")
    assert check_audit([file]).continues == sha256_of_last(parts[1])
    with pytest.raises(BrokenChain, match="line 1"):
        check_audit([parts[0], file])


def sha256_of_last(file: Path) -> str:
    return hashlib.sha256(file.read_bytes().splitlines()[-1]).hexdigest()


def test_rotated_audit_file_with_torn_line(tmp_path: Path) -> None:
    """A new file continues the chain of a renamed one whose last line is torn."""
    file = tmp_path / "audit.jsonl"
    rows = chain(file, 2)
    file.write_bytes(rows[0] + rows[1][:50])
    file.rename(tmp_path / "audit.jsonl.1")
    AuditFile(file).add("received", item="next")
    assert check_audit([tmp_path / "audit.jsonl.1", file]).torn_before == 1


def test_processes_share_one_chain(tmp_path: Path) -> None:
    """While the file is rotated under them."""
    file = tmp_path / "audit.jsonl"

    def child() -> None:
        writer = AuditFile(file)
        for n in range(30):
            writer.add("received", item=f"{n}")

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child) for _ in range(4)]
    for process in processes:
        process.start()
    parts = []
    for n in range(3):
        while not file.exists() or file.read_bytes().count(b"\n") < 8:
            os.sched_yield()
        parts.append(file.rename(tmp_path / f"audit.jsonl-{n}"))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    summary = check_audit([*parts, *([file] if file.exists() else [])])
    assert summary.lines == 120 and len(summary.processes) == 4


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_a_regular_file_is_written(
    kind: str, fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, file, victim = (
        write_mask(tmp_path / "a.nii.gz"),
        tmp_path / "audit.jsonl",
        tmp_path / "victim",
    )
    victim.write_bytes(b"another's")
    {
        "link": lambda: file.symlink_to(victim),
        "fifo": lambda: os.mkfifo(file),
        "folder": file.mkdir,
    }[kind]()
    assert synth(fake_model, tmp_path / "out", mask, "--audit", str(file)) == 4
    assert "remedy" in capsys.readouterr().err and victim.read_bytes() == b"another's"
    assert results(tmp_path / "out") == {}


def test_synth_writes_requested_audit_file(fake_model: Path, tmp_path: Path) -> None:
    mask = write_mask(tmp_path / "a.nii.gz")
    assert (
        synth(fake_model, tmp_path / "plain", mask) == 0
        and not (tmp_path / "plain" / AUDIT).exists()
    )
    assert (
        synth(
            fake_model,
            tmp_path / "out",
            mask,
            "--variants",
            "2",
            "--audit",
            str(tmp_path / "audit.jsonl"),
        )
        == 0
    )
    assert results(tmp_path / "plain")["a_ct.nii.gz"] == results(tmp_path / "out")["a_v0_ct.nii.gz"]
    assert [line["variant"] for line in of("synthesized", tmp_path / "audit.jsonl")] == [0, 1]
    assert (
        synth(
            fake_model,
            tmp_path / "out",
            mask,
            "--dry-run",
            "--audit",
            str(tmp_path / "audit.jsonl"),
        )
        == 2
    )


def test_audit_file_in_inbox_is_refused(fake_model: Path, inbox: Path, tmp_path: Path) -> None:
    assert watch(fake_model, inbox, tmp_path / "out", "--audit", str(inbox / "audit.jsonl")) == 2


def test_audit_escapes_terminal_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters in the audit file reach no terminal."""
    AuditFile(tmp_path / "audit.jsonl").add("synthesized", model_name="a\x1b[2Jb\nc")
    assert run(main, ["audit", str(tmp_path / "audit.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "a?[2Jb?c" in out and "\x1b" not in out


def test_missing_audit_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(main, ["audit", str(tmp_path / "none.jsonl")]) == 2
        and "does not exist" in capsys.readouterr().err
    )
    (tmp_path / "empty.jsonl").touch()
    assert run(main, ["audit", str(tmp_path / "empty.jsonl")]) == 0


class TestNode:
    pytestmark = QUIETLY

    def test_node_audits_delivered_results(self, fake_model: Path, tmp_path: Path) -> None:
        study = write_study(tmp_path / "given")
        with (
            archive(tmp_path / "pacs") as (port, _),
            Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node,
        ):
            assert push(node.port, study) == [0]
            settled(node)
            node.stop()
            log = node.log
        file = tmp_path / "spool" / AUDIT
        actions = [line["action"] for line in lines(file)]
        assert actions == [
            "started",
            "model loaded",
            "received",
            "synthesized",
            "delivered",
            "stopped",
        ]
        (made,), (sent,) = of("synthesized", file), of("delivered", file)
        assert sent["study"] == made["study"] == of("received", file)[0]["study"]
        assert sent["objects"] == 6 and sent["destination"] == f"PACS@127.0.0.1:{port}"
        assert (
            f"mask_sha256={made['mask_sha256']}" in log
            and f"manifest_sha256={made['manifest_sha256']}" in log
        )
        assert not [word for word in SECRETS if word in file.read_text()]
        assert run(main, ["audit", str(file)]) == 0


def killed_after(file: Path, growth: int, line: list[str], root: Path) -> bool:
    """Run the command until the file has grown by so many bytes, then kill it; whether it was
    still at work.
    """
    size = file.stat().st_size if file.exists() else 0
    process = subprocess.Popen([sys.executable, "-m", "runtime", *line], cwd=root)
    until(
        lambda: (
            process.poll() is not None or (file.exists() and file.stat().st_size > size + growth)
        ),
        "it writes",
    )
    at_work = process.poll() is None
    process.kill()
    process.wait(60)
    return at_work


@pytest.mark.slow
def test_killed_runs_audit_every_result(
    fake_model: Path, inbox: Path, tmp_path: Path, root: Path
) -> None:
    """Kills leave no result without an audit line.

    Killed as soon as the file has grown a little, again and again.
    """
    for n in range(12):
        write_mask(inbox / f"mask{n:02d}.nii.gz", blobs(seed=n))
    file = tmp_path / "out" / AUDIT
    line = [*arguments(fake_model, inbox, tmp_path / "out", "--once", "--quiet")]
    kills = sum(killed_after(file, 900 * n, line, root) for n in range(8))
    assert kills >= 4 and run(main, line) == 0
    check_audit([file])
    told = {row["case"] for action in ("synthesized", "skipped") for row in of(action, file)}
    assert told == {f"mask{n:02d}" for n in range(12)}


def test_a_stray_files_name_stays_out(fake_model: Path, tmp_path: Path) -> None:
    """What is put in by mistake may be called after a patient: a letter, a scan of one."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    inbox.mkdir()
    (inbox / "Doe_John_letter.txt").write_text("not a mask")
    line = [
        "watch",
        inbox,
        "--model",
        fake_model,
        "--backend",
        "fake",
        "--output",
        out,
        "--stable",
        0,
        "--poll",
        0.01,
        "--once",
    ]
    assert main([*map(str, line)]) == 1
    text = (out / ".mask2ct.audit.jsonl").read_text()
    assert '"failed"' in text and "Doe" not in text
