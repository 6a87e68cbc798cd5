"""A cache of patients' slices on the canvas, decoded and resampled once.

Each pair of files and settings has one memory-mapped file. Its name is the SHA-256 of everything
that decides its content: a changed file or setting makes a new entry, so no entry is ever stale. An
entry is a .npy of records (labels, image), one per slice, followed by the patient's facts as JSON
and by the SHA-256 of all that: a torn or altered entry is noticed and written again. Entries are
complete when they get their name, so several processes may fill one folder. Nothing removes old
entries; the folder may be deleted whenever no training runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.atomic_files import atomic_file, sha256_of
from runtime.core.context import Context
from runtime.core.manifest import GridPolicy, Intensity, LabelTable, grid_to_json, labels_to_json
from runtime.io.volume_files import volume_files

from .checks import Facts
from .class_folders import class_files
from .dataset import Slices, load_patient, load_tissues
from .layouts import Pair

# The version of the file format and of `load_patient`: a new number leaves old entries unread.
VERSION = 2
# The version of the rules of runtime/core/tissue_classes.py, likewise for context classes.
RULE = 1
# The default cache folder, beside the run folder.
FOLDER = ".slices"
_DIGEST = hashlib.sha256().digest_size


class SliceCache:
    """A `load_patient` that reads from a folder of entries and fills it.

    Its arrays are views of a read-only file.

    Args:
        folder: The cache folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(
        self, pair: Pair, table: LabelTable, policy: GridPolicy, intensity: Intensity
    ) -> Slices:
        """Read one patient's slices.

        Args:
            pair: The files.
            table: The label table.
            policy: The grid policy.
            intensity: The intensity range.

        Returns:
            The slices.

        Raises:
            InputError: A file cannot be used for training.
            OutputError: An entry cannot be written.
        """
        path = self.folder / f"{key(pair, table, policy, intensity)}.npy"
        if not _is_usable(path, pair):
            write(path, load_patient(pair, table, policy, intensity))
        return read(path)

    def tissues(
        self,
        pair: Pair,
        table: LabelTable,
        policy: GridPolicy,
        intensity: Intensity,
        context: Context,
    ) -> NDArray[np.uint8]:
        """Read one patient's context classes, as `train.data.dataset.load_tissues` does.

        They have an entry of their own, so that one without `data.context` stays what it is.

        Args:
            pair: The files.
            table: The label table.
            policy: The grid policy.
            intensity: The intensity range.
            context: The rule.

        Returns:
            uint8 (n, Z, H, W) model indices.

        Raises:
            InputError: A file cannot be used for training.
            OutputError: An entry cannot be written.
        """
        path = self.folder / f"{key(pair, table, policy, intensity, context)}.npy"
        if not _is_usable(path, pair):
            classes = load_tissues(pair, table, policy, intensity, context)
            with atomic_file(path) as handle:
                digest = _Digest(handle.write)
                np.lib.format.write_array(digest, classes, allow_pickle=False)
                handle.write(digest.value)
        mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.asarray(mapped)


def _is_usable(path: Path, pair: Pair) -> bool:
    """Whether an entry is there and intact; a damaged one is reported."""
    if not path.exists():
        return False
    if intact(path):
        return True
    print(
        f"warning: {path} was damaged; it is written again from {pair.image.name}",
        file=sys.stderr,
    )
    return False


def key(
    pair: Pair,
    table: LabelTable,
    policy: GridPolicy,
    intensity: Intensity,
    context: Context | None = None,
) -> str:
    """Hash the content of both volumes and all settings that slices depend on.

    Names and dates do not count.

    Args:
        pair: The files.
        table: The label table.
        policy: The grid policy.
        intensity: The intensity range.
        context: The rule of the context classes; None for the slices themselves.

    Returns:
        64 hexadecimal digits.
    """
    facts = {
        "version": VERSION,
        "image": " ".join(map(sha256_of, volume_files(pair.image))),
        "label": " ".join(_label_digests(pair.label)),
        "labels": labels_to_json(table),
        "grid": grid_to_json(policy),
        "intensity": vars(intensity),
        **({"normalize": True} if pair.normalize else {}),
    }
    if context is not None:
        facts["context"] = context.to_json()
        facts["rule"] = RULE
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _label_digests(label: Path) -> list[str]:
    """SHA-256 of each file of a label map; of a folder of classes with their names."""
    if label.is_dir():
        return [f"{file.name} {sha256_of(file)}" for file in class_files(label)]
    return [sha256_of(file) for file in volume_files(label)]


def write(path: Path, slices: Slices) -> None:
    """Write an entry atomically.

    Args:
        path: The entry.
        slices: The slices.

    Raises:
        OutputError: The entry cannot be written.
    """
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
    """Say whether an entry ends with the SHA-256 of its content.

    Args:
        path: The entry.

    Returns:
        True if it does.
    """
    unread_bytes = path.stat().st_size - _DIGEST
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while unread_bytes > 0 and (chunk := handle.read(min(unread_bytes, 1 << 20))):
            digest.update(chunk)
            unread_bytes -= len(chunk)
        return handle.read() == digest.digest()


def read(path: Path) -> Slices:
    """Read an entry as views of the file: slices that are not used are not in memory.

    Args:
        path: An intact entry.

    Returns:
        The slices, read-only.
    """
    mapped: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    with open(path, "rb") as handle:
        handle.seek(mapped.offset + mapped.nbytes)
        facts = json.loads(handle.read()[:-_DIGEST])
    records = np.asarray(mapped)
    return Slices(
        records["labels"], records["image"], None if facts is None else Facts.from_json(facts)
    )


class _Digest:
    """A file for numpy that hashes what it passes on to `sink`."""

    def __init__(self, sink: Callable[[bytes], int]):
        self._sink, self._digest = sink, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Hash and pass on."""
        self._digest.update(data)
        return self._sink(data)

    @property
    def value(self) -> bytes:
        """The SHA-256 so far."""
        return self._digest.digest()
