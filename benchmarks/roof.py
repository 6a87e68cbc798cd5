"""What this machine can do at most, measured beside the contenders: matrix products, 3x3 convolutions, memory, disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .paired import Contender, Ready

GEMM = 2048  # square
CONV = (64, 64, 128)  # channels, rows, columns: what the networks' middle layers see
ROOF = "roof: "
FP32, INT8, BF16 = (f"{ROOF}{precision} matrix product" for precision in ("fp32", "int8", "bf16"))
CONV_FP32, MEMCPY, DISK = f"{ROOF}fp32 3x3 convolution", f"{ROOF}memcpy", f"{ROOF}disk write"


def contenders(*names: str) -> list[Contender]:
    """The roofs of these names as contenders; units are multiply-accumulates, or bytes for memcpy and disk."""
    makes = {FP32: ("gemm", {"dtype": "float32"}), BF16: ("gemm", {"dtype": "bfloat16"}), INT8: ("gemm_int8", {}), CONV_FP32: ("conv", {}),
             MEMCPY: ("memcpy", {}), DISK: ("disk", {})}  # fmt: skip
    return [Contender(name, f"benchmarks.roof:{makes[name][0]}", makes[name][1]) for name in names]


def gemm(dtype: str) -> Ready:
    import torch

    a, b = (torch.randn(GEMM, GEMM).to(getattr(torch, dtype)) for _ in range(2))
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
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["out"])], "gemm", [a], [out], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {"a": rng.integers(0, 128, (GEMM, GEMM), np.uint8)}

    def run() -> float:
        session.run(None, given)
        return float(GEMM**3)

    return Ready(run)


def conv() -> Ready:
    import torch

    channels, h, w = CONV
    net = torch.nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)
    image = torch.randn(8, channels, h, w).to(memory_format=torch.channels_last)

    def run() -> float:
        with torch.inference_mode():
            net(image)
        return float(8 * channels * channels * 9 * h * w)

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
    block: Any = np.random.default_rng(0).bytes(1 << 26)
    kept = tempfile.TemporaryDirectory(dir=folder)  # goes with the process
    place = Path(kept.name) / "block"

    def run() -> float:
        with open(place, "wb") as handle:
            handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        place.unlink()
        return float(len(block))

    return Ready(run)
