"""The table of backends: what each one needs, and why one is absent.

`auto` states why it chose a backend, and a named backend never falls back to another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.errors import MissingComponent, ModelError, UsageError
from ..core.manifest import Manifest
from .base import Engine, EngineOptions
from .gpu.probe import DRIVER_REMEDY, why_no_gpu
from .onnx_file import check_weights


@dataclass(frozen=True)
class Backend:
    """One row of the table: an engine for one kind of model file.

    Attributes:
        name: the name for `--backend`.
        file: the (kind, precision) of the model file that it runs.
        module: the package that it needs.
        install: the command that installs the package.
        make: opens the engine for a file.
        automatic: whether `auto` may choose it. A user names the others: INT8 differs from the
            network within limits, and FP16 on a CPU serves to reproduce the result of a GPU.
        why: returns what is missing and the remedy, where the package alone is not enough. A GPU
            backend is asked only where there is a GPU.
        unfit: returns why this machine does not run a file with these facts, although nothing is
            missing.
        gpu: whether it computes on a GPU.
    """

    name: str
    file: tuple[str, str]
    module: str
    install: str
    make: Callable[[Path, Manifest, EngineOptions], Engine]
    automatic: bool = True
    why: Callable[[], tuple[str, str] | None] | None = None
    unfit: Callable[[Mapping[str, Any]], str | None] | None = None
    gpu: bool = False

    def open(self, path: Path, manifest: Manifest, options: EngineOptions | None = None) -> Engine:
        """Open the engine for the file at `path`.

        Args:
            path: the model file, whose SHA-256 the caller has checked.
            manifest: the manifest of the model.
            options: the options of the engine.

        Returns:
            The engine.

        Raises:
            ModelError: the library cannot load the file, the file keeps weights elsewhere, or it
                contradicts the manifest.
            MissingComponent: a package, a driver or a GPU is missing.
        """
        if self.file[0] == "onnx":
            check_weights(path)
        return self.make(path, manifest, options or EngineOptions())

    def missing(self) -> tuple[str, str] | None:
        """Return what this machine lacks and the remedy; None where the backend can run."""
        if self.gpu and (no_gpu := why_no_gpu()):
            return no_gpu, DRIVER_REMEDY
        if self.why is not None:
            return self.why()
        if find_spec(self.module) is None:
            return f"{self.module} is not installed", self.install
        return None

    def uninstalled(self) -> str | None:
        """Return the result of `missing` as one phrase; a GPU's remedy is no matter of a phrase."""
        missing = self.missing()
        if missing is None or missing[1] is DRIVER_REMEDY:
            return missing and missing[0]
        return f"{missing[0]} ({missing[1]})"

    def absent(self, manifest: Manifest) -> str | None:
        """Return why this backend cannot run the model here; None where it can."""
        name = manifest.file_of(*self.file)
        if name is None:
            return f"the model holds no {self.file[1]} {self.file[0]} file"
        if missing := self.uninstalled():
            return missing
        return None if self.unfit is None else self.unfit(manifest.files[name].facts)

    def validated(self, manifest: Manifest) -> bool:
        """Return whether the file passed export's parity check in this backend."""
        return self.name in manifest.parity.get(manifest.file_of(*self.file) or "", {})


def _open_onnx(path: Path, manifest: Manifest, options: EngineOptions) -> Engine:
    from .cpu.onnxruntime import OnnxEngine

    return OnnxEngine(path, manifest, options)


def _open_openvino(path: Path, manifest: Manifest, options: EngineOptions) -> Engine:
    from .cpu.openvino import OpenVinoEngine

    return OpenVinoEngine(path, manifest, options)


def _open_tensorrt(path: Path, manifest: Manifest, options: EngineOptions) -> Engine:
    from .gpu.tensorrt import TensorRTEngine

    return TensorRTEngine(path, manifest, options)


def _why_no_tensorrt() -> tuple[str, str] | None:
    from .gpu.tensorrt import TENSORRT

    return TENSORRT.why_absent()


def _open_tensorrt_rtx(path: Path, manifest: Manifest, options: EngineOptions) -> Engine:
    from .gpu.tensorrt_rtx import TensorRTRtxEngine

    return TensorRTRtxEngine(path, manifest, options)


def _why_no_tensorrt_rtx() -> tuple[str, str] | None:
    from .gpu.tensorrt_rtx import why_absent

    return why_absent()


def _why_unfit_for_rtx(facts: Mapping[str, Any]) -> str | None:
    from .gpu.tensorrt_rtx import why_unfit

    return why_unfit(facts)


def _open_onnx_cuda(path: Path, manifest: Manifest, options: EngineOptions) -> Engine:
    from .gpu.onnxruntime_cuda import OnnxCudaEngine

    return OnnxCudaEngine(path, manifest, options)


def _why_no_onnx_cuda() -> tuple[str, str] | None:
    from .gpu.onnxruntime_cuda import why_absent

    return why_absent()


_GPU = 'pip install "mask2ct[gpu]"'
_ONNX = ("onnxruntime", 'pip install "mask2ct[onnx]"', _open_onnx)
_OPENVINO = ("openvino", 'pip install "mask2ct[openvino]"', _open_openvino)

# `auto` takes the first that can run, so the rows stand in the order of their speed
# (docs/decisions/0013-which-engine-auto-takes.md).
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "tensorrt",
        ("engine", "fp16"),
        "tensorrt_lean",
        _GPU,
        _open_tensorrt,
        why=_why_no_tensorrt,
        gpu=True,
    ),
    Backend(
        "tensorrt-rtx",
        ("rtx-engine", "fp16"),
        "tensorrt_rtx_bindings",
        'pip install "mask2ct[rtx]"',
        _open_tensorrt_rtx,
        why=_why_no_tensorrt_rtx,
        unfit=_why_unfit_for_rtx,
        gpu=True,
    ),
    Backend(
        "onnx-cuda",
        ("onnx", "fp16"),
        "onnxruntime",
        _GPU,
        _open_onnx_cuda,
        why=_why_no_onnx_cuda,
        gpu=True,
    ),
    Backend("openvino", ("onnx", "fp32"), *_OPENVINO),
    Backend("onnx", ("onnx", "fp32"), *_ONNX),
    Backend("openvino-fp16", ("onnx", "fp16"), *_OPENVINO, automatic=False),
    Backend("onnx-fp16", ("onnx", "fp16"), *_ONNX, automatic=False),
    # the INT8 form that TensorRT takes, on a CPU: to validate it and to reproduce a GPU's result
    Backend("openvino-int8-gpu", ("onnx", "int8-gpu"), *_OPENVINO, automatic=False),
    Backend("onnx-int8-gpu", ("onnx", "int8-gpu"), *_ONNX, automatic=False),
    Backend("openvino-int8", ("onnx", "int8"), *_OPENVINO, automatic=False),
    Backend("onnx-int8", ("onnx", "int8"), *_ONNX, automatic=False),
)
# Engines of that form, by name: the same code opens them.
BACKENDS += tuple(
    replace(b, name=f"{b.name}-int8", file=(b.file[0], "int8"), automatic=False)
    for b in BACKENDS
    if b.name in ("tensorrt", "tensorrt-rtx")
)
CHOICES = ("auto", *(backend.name for backend in BACKENDS), "fake")


def may_use_gpu(choice: str) -> bool:
    """Whether the engine that is opened by this name (one of `CHOICES`) may compute on a GPU."""
    return any(
        backend.gpu and (backend.name == choice or (choice == "auto" and backend.automatic))
        for backend in BACKENDS
    )


def open_engine(
    backend: str, manifest: Manifest, folder: Path, options: EngineOptions | None = None
) -> tuple[Engine, str, str]:
    """Open an engine for the model in `folder`.

    `auto` takes the fastest backend that is installed and whose file passed export's parity check.
    The SHA-256 of the file is checked before the library loads it.

    Args:
        backend: one of `CHOICES`.
        manifest: the manifest of the model.
        folder: the model folder.
        options: the options of the engine.

    Returns:
        The engine, why it was chosen, and the name of the file that it runs ("" for the fake
        engine).

    Raises:
        UsageError: the backend is unknown.
        MissingComponent: no backend can run the model here.
        ModelError: the file was altered, or it is an INT8 file that was not validated.
    """
    if backend == "fake":
        from .fake import FakeEngine

        return FakeEngine(manifest, options=options), "asked for", ""
    if backend not in CHOICES:
        raise UsageError(
            f"there is no backend {backend!r}",
            expected=", ".join(CHOICES),
            remedy="choose one of these",
        )
    chosen, reason = (
        _automatic(manifest, folder) if backend == "auto" else _by_name(backend, manifest, folder)
    )
    name = manifest.file_of(*chosen.file)
    assert name is not None
    manifest.verify(folder, [name])
    return chosen.open(folder / name, manifest, options), reason, name


def _automatic(manifest: Manifest, folder: Path) -> tuple[Backend, str]:
    """The first backend of the table that can run the model, and why.

    Where there is no GPU, the reason does not speak of the GPU backends.
    """
    skipped: dict[str, list[str]] = {}  # reason → backends
    no_gpu = why_no_gpu()
    for backend in _rows_for_auto(manifest):
        why = no_gpu if backend.gpu and no_gpu else backend.absent(manifest)
        if why is None and not backend.validated(manifest):
            why = "not validated when this model was exported"
        if why is None:
            reasons = ["the fastest that is installed and validated for this model"]
            if not backend.automatic:
                return backend, "INT8, the only precision that this model holds"
            reasons += [f"{', '.join(b)}: {why}" for why, b in skipped.items() if why != no_gpu]
            faster = [
                b.name
                for b in BACKENDS
                if b.file[1] == "int8" and b.absent(manifest) is None and b.validated(manifest)
            ]
            if faster:
                reasons.append(f"INT8 is validated too: --backend {faster[0]}")
            return backend, "; ".join(reasons)
        skipped.setdefault(why, []).append(backend.name)
    raise MissingComponent(
        "no backend can run this model here",
        rows=[f"{', '.join(names)}: {why}" for why, names in skipped.items()],
        expected="a backend and the model file it runs",
        remedy=_remedy_here(manifest, no_gpu),
        file=folder,
    )


def _rows_for_auto(manifest: Manifest) -> list[Backend]:
    """The rows that `auto` chooses from: INT8 only for a model that holds nothing else."""
    rows = [b for b in BACKENDS if b.automatic]
    if any(manifest.file_of(*b.file) for b in rows):
        return rows
    return [b for b in BACKENDS if b.file[1] == "int8" and manifest.file_of(*b.file)] or rows


def _remedy_here(manifest: Manifest, no_gpu: str | None) -> str:
    """What lets this machine run the model: a backend to name, or the command that installs one."""
    rows = [
        b for b in _rows_for_auto(manifest) if manifest.file_of(*b.file) and not (b.gpu and no_gpu)
    ]
    ready = [b.name for b in rows if b.absent(manifest) is None]
    if ready:
        return f"name --backend {ready[0]}, which runs it on this machine"
    installable = [b.install for b in rows]
    return installable[0] if installable else "export the run again"


def _by_name(name: str, manifest: Manifest, folder: Path) -> tuple[Backend, str]:
    """The backend `name`, and why it was chosen."""
    backend = next(b for b in BACKENDS if b.name == name)
    if why := backend.absent(manifest):
        missing = backend.missing()
        remedy = missing[1] if missing else "export the run again, with that file"
        if backend.gpu and (no_gpu := why_no_gpu()):
            why, remedy = no_gpu, f"{_remedy_here(manifest, no_gpu)}; or {DRIVER_REMEDY}"
        raise MissingComponent(
            f"the backend {name} cannot run this model here: {why}",
            expected="a backend and the model file it runs",
            remedy=remedy,
            file=folder,
        )
    if backend.validated(manifest):
        return backend, "asked for"
    if backend.file[1].startswith("int8"):
        raise ModelError(
            f"this model's INT8 file was not validated in {backend.module} when it was exported",
            expected="a parity check in manifest.json",
            remedy=f"export again where {backend.module} is installed, or choose another backend",
            file=folder,
        )
    return backend, "asked for; not validated when this model was exported"
