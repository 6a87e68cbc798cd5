"""What libraries report to their makers, switched off in one place, before any of them is imported.

ONNX Runtime (1.32) decides when it is imported: by then it has written a device id and a database
of events below the home folder and asked for its collector. Its own call `disable_telemetry_events`
comes too late, so a variable of the environment it is, set by `import runtime`, for this process
and those that it starts. `train`, `export` and `benchmarks` import `runtime` first. Standard
library only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime
    "RAY_USAGE_STATS_ENABLED": "0",
    # Weights & Biases: its crash reports, not the run that a config asks for
    "WANDB_ERROR_REPORTING": "false",
}
OPENVINO = "openvino_telemetry"  # has no switch: openvino goes on without the package


def switch_off() -> None:
    """Set every switch, whatever the environment says: nothing is reported."""
    os.environ.update(SWITCHES)


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Within, `package` cannot be imported, even where it is installed or was imported before."""
    modules = {
        name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == package
    }
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(modules)
