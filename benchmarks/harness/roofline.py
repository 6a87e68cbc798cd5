"""What this machine can do at most, measured beside the contenders, and each one's share of it.

Limits: multiply-accumulates a second at each precision (the faster of a square matrix product and a
3x3 convolution), bytes a second copied in memory and written to disk, and starts a second of a
Python that imports numpy and nothing else. A contender states what one unit of its work takes of
each limit (`Contender.cost`). Its share is that of the limit that it is nearest to, the median over
the rounds (Williams et al., "Roofline", 2009).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .paired import Contender, Measured, Ready

GEMM = 2048  # square
CONV = (256, 64, 64)  # channels, rows, columns: enough to keep every multiplier busy
IMAGES = 2
_CONV_MACS = IMAGES * CONV[0] ** 2 * 9 * CONV[1] * CONV[2]
PEAK = "roof: "
# Limit → its peaks: name, function of this module, options.
PEAKS: Mapping[str, tuple[tuple[str, str, Mapping[str, Any]], ...]] = {
    "fp32": (("fp32 matrix product", "gemm", {}), ("fp32 3x3 convolution", "conv", {})),
    "bf16": (("bf16 matrix product", "gemm_bf16", {}), ("bf16 3x3 convolution", "conv_bf16", {})),
    "int8": (("int8 matrix product", "gemm_int8", {}), ("int8 3x3 convolution", "conv_int8", {})),
    "memcpy": (("memcpy", "memcpy", {}),),
    "disk": (("disk write", "disk", {}),),
    "start": (("Python and numpy", "start", {}),),
}


def peaks(*limits: str) -> list[Contender]:
    """The contenders that measure limits.

    Args:
        *limits: Keys of `PEAKS`.

    Returns:
        A contender for each peak.
    """
    return [
        Contender(PEAK + name, f"benchmarks.harness.roofline:{make}", options)
        for limit in limits
        for name, make, options in PEAKS[limit]
    ]


def peaks_for(contenders: Iterable[Contender]) -> list[Contender]:
    """The peaks of every limit that the contenders' costs name.

    Args:
        contenders: What is measured.

    Returns:
        Contenders to measure with them.
    """
    return peaks(*dict.fromkeys(limit for contender in contenders for limit in contender.cost))


def shares(
    contenders: Iterable[Contender], measured: Mapping[str, Measured]
) -> dict[str, tuple[str, float]]:
    """Each contender's share of the limit that it is nearest to.

    Args:
        contenders: What was measured.
        measured: The results by name, those of the peaks included.

    Returns:
        (limit, share) by contender.
    """
    rates = {
        limit: [
            measured[PEAK + name].rates
            for name, *_ in limit_peaks
            if measured.get(PEAK + name, Measured()).rates
        ]
        for limit, limit_peaks in PEAKS.items()
    }
    nearest_limits = {}
    for contender in contenders:
        each = {
            limit: statistics.median(
                cost * rate / max(peak_rates)
                for rate, *peak_rates in zip(
                    measured[contender.name].rates, *rates[limit], strict=True
                )
            )
            for limit, cost in contender.cost.items()
            if rates[limit] and measured[contender.name].rates
        }
        if each:
            nearest = max(each, key=lambda limit: each[limit])
            nearest_limits[contender.name] = (nearest, each[nearest])
    return nearest_limits


def gemm() -> Ready:
    """A square FP32 matrix product in OpenVINO.

    On AMD its kernels reach twice the rate of PyTorch's.

    Returns:
        The contender; its unit is multiply-accumulates.
    """
    from runtime.engines.cpu.openvino import openvino

    openvino()
    from openvino import Model, opset13

    rng = np.random.default_rng(0)
    a, b = (rng.random((GEMM, GEMM), np.float32) for _ in range(2))
    x = opset13.parameter([GEMM, GEMM], np.float32)
    return _infer(Model([opset13.matmul(x, opset13.constant(b), False, False)], [x]), a, GEMM**3)


def conv() -> Ready:
    """An FP32 3x3 convolution in OpenVINO.

    Returns:
        The contender; its unit is multiply-accumulates.
    """
    from runtime.engines.cpu.openvino import openvino

    openvino()
    from openvino import Model, opset13

    channels, h, w = CONV
    rng = np.random.default_rng(0)
    weights, image = (
        rng.random((channels, channels, 3, 3), np.float32),
        rng.random((IMAGES, channels, h, w), np.float32),
    )
    x = opset13.parameter([*image.shape], np.float32)
    one = [1, 1]
    return _infer(
        Model([opset13.convolution(x, opset13.constant(weights), one, one, one, one)], [x]),
        image,
        _CONV_MACS,
    )


def _infer(model: Any, x: Any, macs: int) -> Ready:
    """Run `model`, which has one input, on all cores."""
    from runtime.engines.cpu.openvino import core, openvino

    ov = openvino()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
        "ENABLE_CPU_PINNING": False,
    }
    request = core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x))

    def run() -> float:
        request.infer()
        return float(macs)

    return Ready(run)


def gemm_bf16() -> Ready:
    """A square BF16 matrix product in PyTorch.

    Returns:
        The contender; its unit is multiply-accumulates.
    """
    import torch

    a, b = (torch.randn(GEMM, GEMM).bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def run() -> float:
        torch.mm(a, b, out=out)
        return float(GEMM**3)

    return Ready(run)


def gemm_int8() -> Ready:
    """A square matrix product, uint8 x int8 → int32, as in quantized convolutions.

    Returns:
        The contender; its unit is multiply-accumulates.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    a = helper.make_tensor_value_info("a", TensorProto.UINT8, [GEMM, GEMM])
    out = helper.make_tensor_value_info("out", TensorProto.INT32, [GEMM, GEMM])
    rng = np.random.default_rng(0)
    weights = onnx.numpy_helper.from_array(rng.integers(-64, 64, (GEMM, GEMM), np.int8), "b")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["out"])], "gemm", [a], [out], [weights]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = {"a": rng.integers(0, 128, (GEMM, GEMM), np.uint8)}

    def run() -> float:
        session.run(None, inputs)
        return float(GEMM**3)

    return Ready(run)


def conv_bf16() -> Ready:
    """A BF16 3x3 convolution in PyTorch.

    Returns:
        The contender; its unit is multiply-accumulates.
    """
    import torch

    channels, h, w = CONV
    net = torch.nn.Conv2d(channels, channels, 3, padding=1).to(
        memory_format=torch.channels_last, dtype=torch.bfloat16
    )  # type: ignore[call-overload]
    image = torch.randn(IMAGES, channels, h, w).to(
        memory_format=torch.channels_last, dtype=torch.bfloat16
    )

    def run() -> float:
        with torch.inference_mode():
            net(image)
        return float(_CONV_MACS)

    return Ready(run)


def conv_int8() -> Ready:
    """An INT8 3x3 convolution between QDQ nodes in OpenVINO, as an INT8 graph has it.

    Returns:
        The contender; its unit is multiply-accumulates.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from runtime.engines.cpu.openvino import core

    channels, h, w = CONV
    shape = [IMAGES, channels, h, w]
    rng = np.random.default_rng(0)
    constants = {
        "step": np.float32(0.02),
        "zero": np.uint8(0),
        "weights": rng.integers(-64, 64, (channels, channels, 3, 3), np.int8),
        "steps": np.full(channels, 0.01, np.float32),
        "zeros": np.zeros(channels, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "step", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weights", "steps", "zeros"], ["k"], axis=0),
        helper.make_node("Conv", ["x", "k"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["y", "step", "zero"], ["out"]),
    ]
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name in ("a", "out")
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        tensors[:1],
        tensors[1:],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return _infer(
        core().read_model(model.SerializeToString()),
        rng.integers(0, 128, shape, np.uint8),
        _CONV_MACS,
    )


def start() -> Ready:
    """Start a Python that imports numpy: every program that computes with numpy is slower.

    Returns:
        The contender; its unit is starts.
    """

    def run() -> float:
        subprocess.run([sys.executable, "-c", "import numpy"], check=True)
        return 1.0

    return Ready(run)


def memcpy() -> Ready:
    """Copy bytes in memory.

    Returns:
        The contender; its unit is bytes.
    """
    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)

    def run() -> float:
        np.copyto(target, source)
        return float(source.nbytes)

    return Ready(run)


def disk(folder: str | None = None) -> Ready:
    """Write and sync a file.

    Args:
        folder: Where (default: where temporary files lie).

    Returns:
        The contender; its unit is bytes.
    """
    block = np.random.default_rng(0).bytes(1 << 26)

    def run() -> float:
        with tempfile.NamedTemporaryFile(dir=folder) as handle:
            handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        return float(len(block))

    return Ready(run)
