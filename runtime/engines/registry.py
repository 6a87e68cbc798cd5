"""Which backends there are, what each needs, and why one is absent. Nothing falls back silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..contract import Manifest
from ..errors import MissingComponent, UsageError
from .base import Engine


@dataclass(frozen=True)
class Backend:
    """`file`: the (kind, precision) of the model file it runs; `module` and `install`: the package it needs and the command."""

    name: str
    file: tuple[str, str]
    module: str
    install: str
    open: Callable[[Path, Manifest], Engine]

    def absent(self, manifest: Manifest) -> str | None:
        """Why this backend cannot serve the model here, or None when it can."""
        if manifest.file_of(*self.file) is None:
            return f"the model holds no {self.file[1]} {self.file[0]} file"
        if find_spec(self.module) is None:
            return f"{self.module} is not installed ({self.install})"
        return None


def _open_onnx(path: Path, manifest: Manifest) -> Engine:
    from .onnx import OnnxEngine

    return OnnxEngine(path, manifest)


# In the order `auto` prefers them.
BACKENDS = (Backend("onnx", ("onnx", "fp32"), "onnxruntime", 'pip install "mask2ct[onnx]"', _open_onnx),)
CHOICES = ("auto", *(backend.name for backend in BACKENDS), "fake")


def open_engine(backend: str, manifest: Manifest, folder: Path) -> tuple[Engine, str, str]:
    """Open the engine of that name for the model in `folder`; returns it, why it was chosen and the file it runs.

    `auto` takes the first that is installed and has its file. Its file's SHA-256 is checked before it is loaded. Raises
    `UsageError` for an unknown name, `MissingComponent` when nothing serves, `ModelError` for an altered file.
    """
    if backend == "fake":
        from .fake import FakeEngine

        return FakeEngine(manifest), "asked for", ""
    if backend not in CHOICES:
        raise UsageError(f"there is no backend {backend!r}", expected=", ".join(CHOICES), remedy="choose one of these")
    absent = {b.name: b.absent(manifest) for b in BACKENDS if backend in ("auto", b.name)}
    chosen = next((b for b in BACKENDS if absent.get(b.name, "") is None), None)
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise MissingComponent(f"no backend can run this model here ({reasons})", expected="a backend and the model file it runs",
                               remedy=next(b for b in BACKENDS if b.name in absent).install, file=folder)  # fmt: skip
    name = manifest.file_of(*chosen.file)
    assert name is not None
    manifest.verify(folder, [name])
    passed = [f"{n}: {reason}" for n, reason in absent.items() if reason]
    reason = (
        "asked for" if backend != "auto" else "; ".join(["the first of " + ", ".join(b.name for b in BACKENDS) + " that serves", *passed])
    )
    return chosen.open(folder / name, manifest), reason, name
