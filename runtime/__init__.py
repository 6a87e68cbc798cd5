"""mask2ct's runtime: label masks in, synthetic CT out, from a model folder, without PyTorch.

    from runtime import Synthesizer
    with Synthesizer.open("runs/demo/model") as synth:
        ct = synth(mask)                   # SimpleITK image in → int16 HU on the mask's own grid
        for result in synth.stream(paths, "out/"): ...

`import runtime` needs only numpy and the standard library, and it switches off the telemetry of
other libraries (`runtime.core.telemetry`). Engines and codecs are imported at their first use.

The wheel installs the package as `mask2ct`; in a clone it is `runtime`, the folder's name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.deprecated import RENAMED, keep_old_names, warn_renamed
from .core.import_name import require_one_name
from .core.telemetry import switch_off
from .core.version import VERSION

require_one_name(__name__, __path__)
switch_off()
keep_old_names(__name__)

if TYPE_CHECKING:
    from .api import Synthesizer
    from .batch.progress import ProgressEvent
    from .batch.runner import CaseResult
    from .core.deformation import DeformationParams, deform
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
    from .io.cases import ReadOptions
    from .io.writers.base import FormatOptions
    from .models import Models

__version__ = VERSION

__all__ = [
    "CTSlab",
    "CaseResult",
    "ConfigError",
    "DeformationParams",
    "FormatOptions",
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
    "ProgressEvent",
    "RandWarp",
    "ReadOptions",
    "Synthesizer",
    "UnknownLabels",
    "UnreadableVolume",
    "UsageError",
    "Volume",
    "Warp",
    "deform",
]

# Module → the public names that it defines.
_MODULES = {
    "api": ("Synthesizer",),
    "models": ("Models",),
    "batch.progress": ("ProgressEvent",),
    "batch.runner": ("CaseResult",),
    "core.deformation": ("DeformationParams", "deform"),
    "core.manifest": ("Label", "LabelTable", "Manifest"),
    "core.rand_warp": ("RandWarp",),
    "core.volume": ("CTSlab", "Geometry", "LabelVolume", "Volume"),
    "core.warp": ("IntensityJitter", "Warp"),
    "io.cases": ("ReadOptions",),
    "io.writers.base": ("FormatOptions",),
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562), so that a command starts fast."""
    if name in RENAMED:
        warn_renamed(name, RENAMED[name])
        return __getattr__(RENAMED[name])
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # every other public name is an error
    place = next((module for module, names in _MODULES.items() if name in names), "core.errors")
    globals()[name] = getattr(import_module(f".{place}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    """The names of this module, the public ones that are not imported yet among them."""
    return sorted({*globals(), *__all__})
