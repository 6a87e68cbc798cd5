"""mask2ct's runtime: label masks in, synthetic CT out, from a model folder; no PyTorch.

    from runtime import Synthesizer
    with Synthesizer.open("runs/demo/model") as synth:
        ct = synth(mask)                       # SimpleITK image in → int16 HU on the mask's own grid
        for result in synth.stream(paths, "out/"): ...

Importing this package imports numpy and the standard library, nothing else: engines and codecs come when they are used.
"""

from .contract import Label, LabelTable, Manifest
from .errors import (
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
from .models import Models
from .stream import CaseResult
from .synthesizer import Synthesizer
from .variants import Ranges, vary
from .version import VERSION
from .volume import CTSlab, Geometry, LabelVolume

__version__ = VERSION

__all__ = [
    "CTSlab",
    "CaseResult",
    "ConfigError",
    "Geometry",
    "GeometryError",
    "InputError",
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
    "Ranges",
    "Synthesizer",
    "UnknownLabels",
    "UnreadableVolume",
    "UsageError",
    "vary",
]
