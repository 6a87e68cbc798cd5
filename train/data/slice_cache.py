"""Patients' slices on the canvas, decoded and resampled once: one memory-mapped file for each pair
of files and settings.

An entry's name is the SHA-256 of what decides its content, so a changed file or setting makes a new
entry and nothing is ever stale. It is a .npy of records (labels, image), one a slice, followed by
the patient's facts as JSON and the SHA-256 of all that: an entry that is torn or was altered is
seen, and made again. Entries are renamed into place when whole, so processes may fill one folder
together. Old entries are not removed; the folder may be deleted whenever no training runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.atomic_files import atomic_file, sha256_of
from runtime.core.manifest import GridPolicy, Intensity, LabelTable, grid_to_json, labels_to_json
from runtime.io.volume_files import volume_files

from .checks import Facts
from .dataset import Slices, load_patient
from .layouts import Pair

# of the file, and of what load_patient makes of a patient: another number leaves old entries unread
VERSION = 2
FOLDER = ".slices"  # beside the run folder, unless --cache says otherwise
_DIGEST = hashlib.sha256().digest_size


class SliceCache:
    """The entries in `folder`.

    Calling it is `load_patient`, but that the arrays are views of a read-only file.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(
        self, pair: Pair, table: LabelTable, policy: GridPolicy, intensity: Intensity
    ) -> Slices:
        """One patient's slices. Raises what `load_patient` raises, and `OutputError` when an
        entry cannot be written.
        """
        path = self.folder / f"{key(pair, table, policy, intensity)}.npy"
        if not path.exists():
            write(path, load_patient(pair, table, policy, intensity))
        elif not intact(path):
            print(
                f"warning: {path} was damaged; it is made again from {pair.image.name}",
                file=sys.stderr,
            )
            write(path, load_patient(pair, table, policy, intensity))
        return read(path)


def key(pair: Pair, table: LabelTable, policy: GridPolicy, intensity: Intensity) -> str:
    """64 hexadecimal digits of the two volumes' content and all settings that slices depend on.

    Names and dates do not count.
    """
    facts = {
        "version": VERSION,
        "image": " ".join(map(sha256_of, volume_files(pair.image))),
        "label": " ".join(map(sha256_of, volume_files(pair.label))),
        "labels": labels_to_json(table),
        "grid": grid_to_json(policy),
        "intensity": vars(intensity),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write(path: Path, slices: Slices) -> None:
    """Write an entry atomically. Raises `OutputError`."""
    kind = np.dtype(
        [("labels", np.uint8, slices.labels.shape[1:]), ("image", "<i2", slices.image.shape[1:])]
    )
    records = np.empty(len(slices), kind)
    records["labels"], records["image"] = slices.labels, slices.image
    with atomic_file(path) as handle:
        digest = _Digest(handle.write)
        np.lib.format.write_array(digest, records, allow_pickle=False)
        digest.write(json.dumps(None if slices.facts is None else slices.facts.to_json()).encode())
        handle.write(digest.value)


def intact(path: Path) -> bool:
    """Whether an entry ends with the SHA-256 of what comes before it."""
    left = path.stat().st_size - _DIGEST
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while left > 0 and (chunk := handle.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        return handle.read() == digest.digest()


def read(path: Path) -> Slices:
    """An entry's slices as read-only views of the file: what is not touched is not in memory."""
    mapped: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    with open(path, "rb") as handle:
        handle.seek(mapped.offset + mapped.nbytes)
        facts = json.loads(handle.read()[:-_DIGEST])
    records = np.asarray(mapped)
    return Slices(
        records["labels"], records["image"], None if facts is None else Facts.from_json(facts)
    )


class _Digest:
    """A file to numpy that hashes what it passes on to `sink`."""

    def __init__(self, sink: Callable[[bytes], int]):
        self._sink, self._digest = sink, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._sink(data)

    @property
    def value(self) -> bytes:
        return self._digest.digest()
