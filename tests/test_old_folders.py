"""A watched folder and a spool as mask2ct 0.1 left them, killed: the work goes on.

Every name and every byte that tells a state is written out here, so that no new version renames or
reformats them unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
from dicom_masks import save, slices
from nodes import QUIETLY, Serving, archive, push, settled, until, write_study
from samples import blobs, is_tidy, listed, write_mask

from runtime.__main__ import main
from runtime.core.console import run

pytestmark = QUIETLY


def line(**facts: object) -> bytes:
    """A line of a journal or delivery log."""
    body = json.dumps(facts).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def test_old_inbox_is_continued(fake_model: Path, tmp_path: Path) -> None:
    """Claimed masks are taken over, poison fails, and journal, names and reasons stay."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    for folder in (inbox / "done", inbox / "failed", out):
        folder.mkdir(parents=True)
    for number, (name, starts) in enumerate((("a", b""), ("b", b".."), ("poison", b"." * 10))):
        lease = inbox / ".work" / f"{digest(str(out), 8)}-{number:012x}"
        lease.mkdir(parents=True)
        write_mask(lease / f"{name}.nii.gz", blobs(seed=number))
        (lease / ".lock").touch()
        (lease / ".starts").write_bytes(starts)
    (inbox / ".work" / ".lock").touch()
    # A claim that was killed before its rename.
    (inbox / ".work" / f"{digest(str(out), 8)}-00000000000a").mkdir()
    (inbox / ".work" / f"{digest(str(out), 8)}-00000000000a" / ".lock").touch()
    write_mask(inbox / "done" / "c.nii.gz", blobs(seed=7))
    write_mask(inbox / "c.nii.gz", blobs(seed=8))
    entry = line(result="x", key="k", files={"x_ct.nii.gz": "d"}, slices=3, warnings=[], mask="m")
    (out / ".mask2ct.journal").write_bytes(entry + entry[:-9])
    arguments = ["watch", inbox, "--model", fake_model, "--backend", "fake", "--output", out]
    assert run(main, [*map(str, arguments), "--stable", "0", "--poll", "0.01", "--once"]) == 1
    assert listed(inbox / "done") == {"a.nii.gz", "b.nii.gz", "c.nii.gz", "c-2.nii.gz"}
    assert listed(inbox / "failed") == {"poison.nii.gz", "poison.nii.gz.reason.txt"}
    reason = (inbox / "failed" / "poison.nii.gz.reason.txt").read_text()
    assert "each of the last 10 starts" in reason and is_tidy(inbox)
    assert {f"{name}_ct.nii.gz" for name in "abc"} <= listed(out)
    first, torn, *added = (out / ".mask2ct.journal").read_bytes().splitlines(keepends=True)
    assert first == entry and torn == entry[:-9] + b"\n"
    facts = [json.loads(row[9:]) for row in added]
    assert [row[:8] for row in added] == [b"%08x" % zlib.crc32(row[9:-1]) for row in added]
    assert {row["result"] for row in facts} == {"a", "b", "c"}
    assert all(row.keys() == json.loads(entry[9:]).keys() for row in facts)


def test_old_spool_is_continued(fake_model: Path, tmp_path: Path) -> None:
    """Studies of every state go on, and what an archive acknowledged is not sent again."""
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    begun, poison = spool / "studies" / "study-00aa-1", spool / "studies" / "study-00bb-1"
    for seed, study, starts in ((1, begun, b"."), (2, poison, b"." * 10)):
        (study / "objects").mkdir(parents=True)
        mask = write_study(tmp_path / f"{seed}", seed)
        mask.rename(study / "objects" / f"mask-{digest(study.name, 32)}.dcm")
        (study / ".starts").write_bytes(starts)
    # A claim that was killed before its rename.
    (spool / "studies" / "study-00cc-1").mkdir()
    arriving = spool / "incoming" / f"study-{digest('late', 16)}"
    arriving.mkdir(parents=True)
    write_study(tmp_path / "3", 3).rename(arriving / f"mask-{digest('late', 32)}.dcm")
    # A study that is half sent; its delivery log ends with a torn line.
    package = spool / "outbox" / "study-00dd-1"
    series = slices(np.zeros((3, 8, 8), np.int16), Modality="CT")
    save(package / "results" / "seg-1", series, "slice")
    files = sorted(path.name for path in (package / "results" / "seg-1").iterdir())
    with archive(tmp_path / "pacs") as (port, seen):
        destination = f"PACS@127.0.0.1:{port}"
        log = package / f".sent-{digest(destination, 16)}.journal"
        first, second = (line(sent=f"seg-1/{name}") for name in files[:2])
        log.write_bytes(first + second[:-4])
        options = ("--keep", "--send-to", destination)
        with Serving(fake_model, spool, *options) as node:
            settled(node, 4)
            until(lambda: listed(spool / "failed"), "the poison study is put aside")
            # One more object, so that the node is seen to receive on the old folder.
            assert push(node.port, write_study(tmp_path / "4", 4)) == [0]
            settled(node, 5)
            rooms = node.get("/metrics")
            assert node.stop()[0] == 0
    sent = spool / "done" / "study-00dd-1" / log.name
    assert sent.read_bytes().startswith(first + second[:-4] + b"\n")
    assert {str(ds.SOPInstanceUID) for ds in series[1:]} <= {*seen}
    assert str(series[0].SOPInstanceUID) not in seen
    assert 'mask2ct_node_studies{room="outbox"} 0.0' in rooms
    assert listed(spool / "failed") == {poison.name}
    assert listed(spool / "failed" / poison.name) == {"objects", "reason.txt", ".starts"}
    assert not listed(spool / "studies") and not listed(spool / "outbox")
    assert len(listed(spool / "done")) == 4 and {begun.name, f"{arriving.name}-1"} <= listed(
        spool / "done"
    )
