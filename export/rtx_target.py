"""What only the builder of TensorRT for RTX has: the GPUs that one engine is built for.

It stands apart from `export.to_tensorrt`, whose names all versions of TensorRT share.
"""

from __future__ import annotations

from typing import Any

from runtime.core.errors import BuildError
from runtime.engines.gpu.tensorrt_rtx import COMPUTE_CAPABILITIES, RTX, written


def set_compute_capabilities(trt: Any, config: Any) -> None:
    """Build one engine for every compute capability that the runtime serves.

    Args:
        trt: The builder's module.
        config: Its `IBuilderConfig`.

    Raises:
        BuildError: This builder does not know one of them.
    """
    config.num_compute_capabilities = len(COMPUTE_CAPABILITIES)
    for index, (major, minor) in enumerate(COMPUTE_CAPABILITIES):
        member = getattr(trt.ComputeCapability, f"SM{major}{minor}", None)
        if member is None or not config.set_compute_capability(member, index):
            raise BuildError(
                f"{RTX.title} {trt.__version__} builds nothing for {written((major, minor))}",
                expected="a builder that knows this compute capability",
                remedy='pip install -e ".[rtx]"',
            )
