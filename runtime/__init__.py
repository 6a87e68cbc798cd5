"""mask2ct's runtime: label masks in, synthetic CT out, from a model folder; no PyTorch.

    from runtime import Synthesizer
    with Synthesizer.open("runs/demo/model") as synth:
        ct = synth(mask)                       # SimpleITK image in → int16 HU on the mask's own grid
        for result in synth.stream(paths, "out/"): ...

Importing this package imports next to nothing and switches off what libraries report to their makers (`runtime.core.telemetry`).
What is taken from it comes with numpy and the standard library alone, engines and codecs when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.telemetry import switch_off
from .core.version import VERSION

switch_off()

if TYPE_CHECKING:
    from .batch.model_router import Models
    from .batch.runner import CaseResult
    from .core.deformation import Ranges, vary
    from .core.errors import (
        ConfigError,
        GeometryError,
        InputError,
        Mask2CTError,
        MemoryCapExceeded,
        MissingComponent,
        ModelError,
        OutputError,
        UnknownLabels,
        UnreadableVolume,
        UsageError,
    )
    from .core.manifest import Label, LabelTable, Manifest
    from .core.rand_warp import RandWarp
    from .core.volume import CTSlab, Geometry, LabelVolume, Volume
    from .core.warp import IntensityJitter, Warp
    from .synthesizer import Synthesizer

__version__ = VERSION

__all__ = [
    "CTSlab",
    "CaseResult",
    "ConfigError",
    "Geometry",
    "GeometryError",
    "InputError",
    "IntensityJitter",
    "Label",
    "LabelTable",
    "LabelVolume",
    "Manifest",
    "Mask2CTError",
    "MemoryCapExceeded",
    "MissingComponent",
    "ModelError",
    "Models",
    "OutputError",
    "RandWarp",
    "Ranges",
    "Synthesizer",
    "UnknownLabels",
    "UnreadableVolume",
    "UsageError",
    "Volume",
    "Warp",
    "vary",
]

_HOMES = ("errors", "volume", "contract", "variants", "warp", "rand_warp", "models", "stream", "synthesizer")


def __getattr__(name: str) -> Any:
    """A public name, when it is first asked for (PEP 562): who only starts the command waits for nothing else."""
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
