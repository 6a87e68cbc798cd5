"""What this machine can do at most, measured beside the contenders, and each one's share of it.

Limits: multiply-accumulates a second at each precision (the faster of a square matrix product and a
3x3 convolution), bytes a second copied in memory and written to disk, and starts a second of a
Python that imports numpy and nothing else. A contender says what one unit of its work takes of each
(`Contender.cost`); its share is that of the limit it is nearest to, the median over the rounds.
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
CONV = (256, 64, 64)  # channels, rows, columns: as many as keep every multiplier busy
IMAGES = 2
_CONV_MACS = IMAGES * CONV[0] ** 2 * 9 * CONV[1] * CONV[2]
PEAK = "roof: "
# Limit → its roofs: name, function of this module, options.
PEAKS: Mapping[str, tuple[tuple[str, str, Mapping[str, Any]], ...]] = {
    "fp32": (("fp32 matrix product", "gemm", {}), ("fp32 3x3 convolution", "conv", {})),
    "bf16": (("bf16 matrix product", "gemm_bf16", {}), ("bf16 3x3 convolution", "conv_bf16", {})),
    "int8": (("int8 matrix product", "gemm_int8", {}), ("int8 3x3 convolution", "conv_int8", {})),
    "memcpy": (("memcpy", "memcpy", {}),),
    "disk": (("disk write", "disk", {}),),
    "start": (("Python and numpy", "start", {}),),
}


def peaks(*limits: str) -> list[Contender]:
    """The contenders that measure these limits."""
    return [
        Contender(PEAK + name, f"benchmarks.harness.roofline:{make}", options)
        for limit in limits
        for name, make, options in PEAKS[limit]
    ]


def beside(contenders: Iterable[Contender]) -> list[Contender]:
    """The roofs of every limit that the contenders' costs name."""
    return peaks(*dict.fromkeys(limit for contender in contenders for limit in contender.cost))


def shares(
    contenders: Iterable[Contender], measured: Mapping[str, Measured]
) -> dict[str, tuple[str, float]]:
    """Contender → (the limit it is nearest to, its share of it)."""
    rates = {
        limit: [
            measured[PEAK + name].rates
            for name, *_ in made
            if measured.get(PEAK + name, Measured()).rates
        ]
        for limit, made in PEAKS.items()
    }
    found = {}
    for contender in contenders:
        each = {
            limit: statistics.median(
                cost * rate / max(roof)
                for rate, *roof in zip(measured[contender.name].rates, *rates[limit], strict=True)
            )
            for limit, cost in contender.cost.items()
            if rates[limit] and measured[contender.name].rates
        }
        if each:
            nearest = max(each, key=lambda limit: each[limit])
            found[contender.name] = (nearest, each[nearest])
    return found


def gemm() -> Ready:
    """By OpenVINO, whose kernels reach twice what PyTorch's matrix product does on AMD."""
    from runtime.engines.cpu.openvino import openvino

    openvino()
    from openvino import Model, opset13

    rng = np.random.default_rng(0)
    a, b = (rng.random((GEMM, GEMM), np.float32) for _ in range(2))
    given = opset13.parameter([GEMM, GEMM], np.float32)
    return _infer(
        Model([opset13.matmul(given, opset13.constant(b), False, False)], [given]), a, GEMM**3
    )


def conv() -> Ready:
    from runtime.engines.cpu.openvino import openvino

    openvino()
    from openvino import Model, opset13

    channels, h, w = CONV
    rng = np.random.default_rng(0)
    weights, image = (
        rng.random((channels, channels, 3, 3), np.float32),
        rng.random((IMAGES, channels, h, w), np.float32),
    )
    given = opset13.parameter([*image.shape], np.float32)
    one = [1, 1]
    return _infer(
        Model([opset13.convolution(given, opset13.constant(weights), one, one, one, one)], [given]),
        image,
        _CONV_MACS,
    )


def _infer(model: Any, given: Any, macs: int) -> Ready:
    """`model`, of one input, on all cores."""
    from runtime.engines.cpu.openvino import openvino

    ov = openvino()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
        "ENABLE_CPU_PINNING": False,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(given))

    def run() -> float:
        request.infer()
        return float(macs)

    return Ready(run)


def gemm_bf16() -> Ready:
    import torch

    a, b = (torch.randn(GEMM, GEMM).bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def run() -> float:
        torch.mm(a, b, out=out)
        return float(GEMM**3)

    return Ready(run)


def gemm_int8() -> Ready:
    """uint8 x int8 → int32, as quantised convolutions multiply."""
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
    given = {"a": rng.integers(0, 128, (GEMM, GEMM), np.uint8)}

    def run() -> float:
        session.run(None, given)
        return float(GEMM**3)

    return Ready(run)


def conv_bf16() -> Ready:
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
    """uint8 x int8 between quantise and dequantise nodes, as an INT8 graph has it, in OpenVINO."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from runtime.engines.cpu.openvino import openvino

    ov = openvino()
    channels, h, w = CONV
    shape = [IMAGES, channels, h, w]
    rng = np.random.default_rng(0)
    held = {
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
        [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return _infer(
        ov.Core().read_model(model.SerializeToString()),
        rng.integers(0, 128, shape, np.uint8),
        _CONV_MACS,
    )


def start() -> Ready:
    """What no program that computes with numpy can be faster than."""

    def run() -> float:
        subprocess.run([sys.executable, "-c", "import numpy"], check=True)
        return 1.0

    return Ready(run)


def memcpy() -> Ready:
    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)

    def run() -> float:
        np.copyto(target, source)
        return float(source.nbytes)

    return Ready(run)


def disk(folder: str | None = None) -> Ready:
    """Writing and syncing a file where temporary files lie."""
    block = np.random.default_rng(0).bytes(1 << 26)

    def run() -> float:
        with tempfile.NamedTemporaryFile(dir=folder) as handle:
            handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        return float(len(block))

    return Ready(run)
