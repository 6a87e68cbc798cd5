"""Switch off the telemetry of libraries, in one place and before any of them is imported.

ONNX Runtime (1.32) decides during its import: it writes a device id and a database of events below
the home folder and contacts its collector. Its function `disable_telemetry_events` comes too late.
So `import runtime` sets an environment variable, for this process and those that it starts.
`train`, `export` and `benchmarks` import `runtime` first. This module imports only the standard
library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime
    "RAY_USAGE_STATS_ENABLED": "0",
    # Weights & Biases: the crash reports, not the run of a training configuration
    "WANDB_ERROR_REPORTING": "false",
}
OPENVINO = "openvino_telemetry"  # it has no switch, but openvino works without the package


def switch_off() -> None:
    """Set every switch, over the values of the environment."""
    os.environ.update(SWITCHES)


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Within the block, `package` cannot be imported, although it is installed or was imported.

    Args:
        package: The name of a top-level package.
    """
    modules = {
        name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == package
    }
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(modules)
