"""A model folder that comes as a zip: from bytes or from an open file.

Its files are unpacked into this process's private folder, because engines read files.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .errors import ModelError, writing
from .manifest import MANIFEST, MAX_BYTES, Manifest
from .workspace import private_folder

if TYPE_CHECKING:
    from zipfile import ZipFile


def unpack_model(source: bytes | IO[bytes]) -> tuple[Path, Callable[[], None]]:
    """Unpack a zipped model folder. Of its members, only what the manifest lists is written.

    Args:
        source: The zip. Its manifest.json may lie in a folder of the zip.

    Returns:
        The model folder, and a function that removes it.

    Raises:
        ModelError: It is no zip of a model folder.
        OutputError: The private folder cannot be written.
    """
    import io
    import zipfile

    handle = io.BytesIO(source) if isinstance(source, bytes) else source
    with writing(tempfile.gettempdir()):
        folder = Path(tempfile.mkdtemp(prefix="model-", dir=private_folder()))

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    try:
        with zipfile.ZipFile(handle) as packed:
            _unpack(packed, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as exc:
        remove()
        raise _refusal(f"it cannot be read as a zip: {exc}") from exc
    except BaseException:
        remove()
        raise
    return folder, remove


def _unpack(packed: ZipFile, folder: Path) -> None:
    names = packed.namelist()
    manifests = [name for name in names if name.rpartition("/")[2] == MANIFEST]
    if len(manifests) != 1:
        raise _refusal(f"it holds {len(manifests)} files called {MANIFEST}")
    within = manifests[0].removesuffix(MANIFEST)
    _write(packed, manifests[0], folder / MANIFEST, MAX_BYTES)
    # The names in a manifest have no folders: it was checked.
    for name, file in Manifest.load(folder).files.items():
        if within + name in names:
            _write(packed, within + name, folder / name, file.bytes)


def _write(packed: ZipFile, member: str, path: Path, most: int) -> None:
    """Write a member, and refuse one of more than `most` bytes before it fills the disk."""
    left = most
    with writing(path), packed.open(member) as source, path.open("xb") as target:
        while piece := source.read(min(left + 1, 1 << 20)):
            left -= len(piece)
            if left < 0:
                raise _refusal(f"{path.name} has more than {most} bytes")
            target.write(piece)


def _refusal(reason: str) -> ModelError:
    return ModelError(
        f"the model that was given as bytes cannot be used: {reason}",
        expected="a zip of one model folder, as export writes it",
        remedy="zip the folder again, or give its path",
    )
