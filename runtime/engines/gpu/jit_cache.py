"""The folder in which compiled GPU kernels are kept from one process to the next.

TensorRT for RTX compiles its kernels on the GPU when an engine is opened, which takes seconds. A
cache of them holds code that the GPU will run, so the folder is the user's alone (mode 700), and
one that others could write to is not used.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from ...core.atomic_files import atomic_file, private

# Where the folder is, for whoever sets it; empty: nothing is kept.
VARIABLE = "MASK2CT_CACHE"
MAX_BYTES = 256 << 20  # of all files together; the oldest ones go first
SUFFIX = ".jit"


def jit_folder() -> Path | None:
    """The folder: `$MASK2CT_CACHE`, else `mask2ct` in the user's folder of caches.

    Returns:
        The folder, which may not exist; None where nothing is to be kept.
    """
    stated = os.environ.get(VARIABLE)
    if stated is not None:
        return Path(stated) if stated else None
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "mask2ct"
    except RuntimeError:  # a user without a home
        return None


class JitCache:
    """The kernels of one engine on one GPU: a file in the folder.

    Nothing here raises: where the folder cannot be used, kernels are compiled anew each time.

    Attributes:
        note: for people, what became of the cache; never the folder's path, which names the user.
    """

    def __init__(self, key: str, folder: Path | None = None, most: int = MAX_BYTES):
        """Find the file of `key`.

        Args:
            key: what the kernels depend on (engine, library, GPU), as a plain file name.
            folder: the folder (default: `jit_folder`).
            most: the cap of the folder in bytes.
        """
        self._folder = jit_folder() if folder is None else folder
        self._file = None if self._folder is None else self._folder / f"{key}{SUFFIX}"
        self._most = most
        self.note = "JIT cache off" if self._file is None else "JIT cache new"

    def read(self) -> bytes:
        """The kept kernels; nothing where there are none or the folder is not safe."""
        if self._file is None or not self._safe():
            return b""
        try:
            content = self._file.read_bytes()
        except OSError:
            return b""
        self.note = f"JIT cache {len(content) / 1e6:.1f} MB"
        return content

    def write(self, content: bytes) -> None:
        """Keep the kernels, and remove the oldest files until the folder is within its cap.

        Args:
            content: the kernels as the library serializes them.
        """
        if self._file is None or not content or len(content) > self._most:
            return
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._safe():
                return
            with private(), atomic_file(self._file) as handle:
                handle.write(content)
            self._shrink()

    def _safe(self) -> bool:
        """Whether nobody but this user can write to the folder."""
        assert self._folder is not None
        try:
            state = os.stat(self._folder, follow_symlinks=False)
        except OSError:
            return False
        owned = not hasattr(os, "getuid") or state.st_uid == os.getuid()
        if stat.S_ISDIR(state.st_mode) and owned and not state.st_mode & 0o022:
            return True
        self.note = "JIT cache off (others can write to its folder)"
        return False

    def _shrink(self) -> None:
        assert self._folder is not None
        files = [(file.stat(), file) for file in self._folder.glob(f"*{SUFFIX}")]
        total = sum(state.st_size for state, _ in files)
        for state, file in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
            if total <= self._most:
                return
            file.unlink()
            total -= state.st_size
