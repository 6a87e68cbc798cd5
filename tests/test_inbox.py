"""When an item of a watched folder counts as complete, and who has it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from samples import is_tidy, listed, write_mask

import runtime.service.work_queue
from runtime.core.errors import OutputError, UsageError
from runtime.service.attempts import attempts
from runtime.service.work_queue import ATTEMPTS, DONE, FAILED, PATIENCE, WORK, Inbox


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr("runtime.service.work_queue.time.monotonic", lambda: self.now)


def names(inbox: Inbox) -> list[str]:
    return [path.name for path in inbox.look()]


def test_unchanged_inbox_item_is_complete(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file or folder is complete when nothing in it has changed for the stable time."""
    clock, watched = (
        Clock(monkeypatch),
        Inbox(inbox, tmp_path / "out", stable=5, is_complete=lambda path: True),
    )
    (inbox / "a").write_bytes(b"1")
    (inbox / "series").mkdir()
    (inbox / "series" / "1").write_bytes(b"1")
    assert names(watched) == [] and watched.settling
    clock.now += 4.9
    assert names(watched) == []
    (inbox / "series" / "2").write_bytes(b"")
    clock.now += 0.2
    assert names(watched) == ["a"]
    for change in (
        lambda: (inbox / "series" / "2").write_bytes(b"2"),
        lambda: os.utime(inbox / "series" / "1", ns=(0, 7)),
    ):
        change()
        clock.now += 4.9
        assert (
            names(watched) == ["a"] and not watched.settling
        )  # it has just changed: nobody knows when it will be done
        clock.now += 4.9
        assert names(watched) == ["a"] and watched.settling
    clock.now += 0.2
    assert names(watched) == ["a", "series"] or names(watched) == ["series", "a"]


def test_incomplete_item_waits_longer(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item that looks incomplete is waited for longer, and then taken."""
    clock, looked = Clock(monkeypatch), []
    watched = Inbox(
        inbox, tmp_path / "out", stable=5, is_complete=lambda path: bool(looked.append(path))
    )
    (inbox / "a").write_bytes(b"half of it")
    watched.look()
    for _ in range(3):
        clock.now += 5
        assert all(watched.claim(item) is None for item in watched.look()) and watched.settling
    assert len(looked) == 1  # what has not changed is not opened again
    clock.now += 5 * PATIENCE
    (item,) = watched.look()
    claim = watched.claim(item)
    assert claim is not None and claim.item.read_bytes() == b"half of it" and not item.exists()
    watched.leave(claim)


def test_item_changed_before_claim_returns(inbox: Path, tmp_path: Path) -> None:
    """An item that changes between the look and the claim is put back."""
    watched = Inbox(inbox, tmp_path / "out", stable=0, is_complete=lambda path: True)
    (inbox / "a").write_bytes(b"1")
    (item,) = watched.look()
    item.write_bytes(b"12")
    assert watched.claim(item) is None and item.read_bytes() == b"12" and is_tidy(inbox) is False
    assert listed(inbox / WORK) == set()


def test_ticket_is_tried_again(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ticket that another process took for one of a dead process is tried again.

    Between the making of its folder and of its lock; who watches `--once` does not end then.
    """
    item = write_mask(inbox / "a.nii.gz")
    mine, others = (
        Inbox(inbox, tmp_path / "out", stable=0, is_complete=lambda path: True) for _ in range(2)
    )
    hold = runtime.service.work_queue._hold

    def late(lease: Path, flags: int = 0) -> int | None:
        monkeypatch.undo()
        assert not [*others.stale_items()]
        return hold(lease, flags)

    assert mine.look() == [item]
    monkeypatch.setattr(runtime.service.work_queue, "_hold", late)
    assert mine.claim(item) is None and mine.settling
    assert mine.look() == [item] and mine.claim(item) is not None


def test_one_of_many_claims_succeeds(inbox: Path, tmp_path: Path) -> None:
    watchers = [
        Inbox(inbox, tmp_path / "out", stable=0, is_complete=lambda path: True) for _ in range(8)
    ]
    with ThreadPoolExecutor(len(watchers)) as threads:
        for n in range(20):
            (inbox / f"{n}").write_bytes(b"1")
            seen = [watched.look() for watched in watchers]
            assert all(items == [inbox / f"{n}"] for items in seen)
            claims = list(
                threads.map(lambda one: one[0].claim(one[1][0]), zip(watchers, seen, strict=True))
            )
            (claim,) = [claim for claim in claims if claim is not None]
            assert claim.item.read_bytes() == b"1"
            assert not [
                other for watched in watchers for other in watched.stale_items()
            ]  # it is alive
            watchers[0].finish(claim)
    assert listed(inbox / DONE) == {f"{n}" for n in range(20)} and is_tidy(inbox)


def test_interrupted_claim_closes_once(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt while a claim ends closes nothing twice."""
    watched, really = (
        Inbox(inbox, tmp_path / "out", stable=0, is_complete=lambda path: True),
        os.close,
    )
    (inbox / "a").write_bytes(b"1")
    (item,) = watched.look()
    claim = watched.claim(item)
    assert claim is not None

    def interrupted(handle: int) -> None:
        really(handle)
        if handle == claim.handle:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watched.finish(claim)
    monkeypatch.undo()
    watched.leave(claim)
    assert listed(inbox / DONE) == {"a"} and is_tidy(inbox)


def test_claim_precedes_opening(inbox: Path, tmp_path: Path) -> None:
    """An item is claimed and its attempt is counted before it is opened."""
    (inbox / "a").write_bytes(b"1")
    seen: list[tuple[str, int, int]] = []

    def look_into(path: Path) -> bool:
        count = attempts(path.parent / ATTEMPTS)
        seen.append((path.parent.parent.name, count, len(listed(inbox))))
        return True

    watched = Inbox(inbox, tmp_path / "out", stable=0, is_complete=look_into)
    claim = watched.claim(*watched.look())
    assert claim is not None and seen == [(WORK, 1, 1)]  # .work alone is left there
    assert attempts(claim.attempts) == 0  # the process lives
    watched.leave(claim)


def test_full_disk_still_empties_inbox(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving takes no room, counting does."""

    def full(file: Path) -> Any:
        raise OutputError("the disk is full")

    (inbox / "a").write_bytes(b"1")
    monkeypatch.setattr(runtime.service.work_queue, "count_attempt", full)
    watched = Inbox(inbox, tmp_path / "out", stable=0, is_complete=lambda path: True)
    claim = watched.claim(*watched.look())
    assert claim is not None
    assert watched.finish(claim) == inbox / DONE / "a"


def test_incomplete_item_returns_unchanged(inbox: Path, tmp_path: Path) -> None:
    (inbox / "series").mkdir()
    (inbox / "series" / "1").write_bytes(b"half")
    watched = Inbox(inbox, tmp_path / "out", stable=1e-9, is_complete=lambda path: False)
    watched.look()
    (item,) = watched.look()
    watched._observed[item.name].age = 0  # as young as it may be
    assert watched.claim(item) is None and watched.settling
    assert (inbox / "series" / "1").read_bytes() == b"half" and listed(inbox / WORK) == set()


def test_items_of_one_name_are_kept(inbox: Path, tmp_path: Path) -> None:
    """While it is looked into a sender begins anew: neither file takes the other's place."""
    (inbox / "a").write_bytes(b"half")

    def begin_anew(path: Path) -> bool:
        (inbox / "a").write_bytes(b"whole")
        return False

    watched = Inbox(inbox, tmp_path / "out", stable=1, is_complete=begin_anew)
    watched.look()
    watched._observed["a"].age = 1
    claim = watched.claim(inbox / "a")
    assert (
        claim is not None
        and claim.item.read_bytes() == b"half"
        and (inbox / "a").read_bytes() == b"whole"
    )
    watched.leave(claim)


def test_interrupted_look_returns_item(inbox: Path, tmp_path: Path) -> None:
    """An interrupt while an item is looked into puts the item back."""
    (inbox / "a").write_bytes(b"1")

    def interrupted(path: Path) -> bool:
        raise KeyboardInterrupt

    watched = Inbox(inbox, tmp_path / "out", stable=0, is_complete=interrupted)
    with pytest.raises(KeyboardInterrupt):
        watched.claim(*watched.look())
    assert (inbox / "a").read_bytes() == b"1" and listed(inbox / WORK) == set()


@pytest.mark.parametrize("name", [WORK, DONE, FAILED])
def test_linked_inbox_folders_are_refused(name: str, inbox: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (inbox / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"{name} in the watched folder is a link"):
        Inbox(inbox, tmp_path / "out", stable=0, is_complete=lambda path: True)


def test_a_link_counts_by_itself(inbox: Path, tmp_path: Path) -> None:
    """What it leads to is not asked, and a broken one is not waited for for ever."""
    (inbox / "a").symlink_to(tmp_path / "nowhere")
    watched = Inbox(inbox, tmp_path / "out", stable=0, is_complete=lambda path: True)
    assert watched.look() == [inbox / "a"]
