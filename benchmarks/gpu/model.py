"""A small model with random weights for checks on a GPU; nothing has to be trained.

It needs torch and onnx, not SimpleITK.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.atomic_files import sha256_of, write_json
from runtime.core.labels import MM_WHS
from runtime.core.manifest import MANIFEST, GridPolicy, Intensity, Manifest, ModelFile

NAME = "random weights"
GENERATOR: dict[str, Any] = {
    "kind": "unet",
    "filters": 32,
    "depth": 5,
    "skips": True,
    "textures": 4,
    "style": 2,
}
GRID = GridPolicy((128, 128), (3.0, 3.0), 32, slices=3, slice_spacing=9.0)


def random_graph() -> tuple[Manifest, Any]:
    """A U-Net with random weights and every input that the contract knows.

    Returns:
        Its manifest without files, and the network as `export.graph` wraps it.
    """
    import torch

    from export.graph import LabelsToIntensity
    from train.networks.generator import Generator, initialise

    torch.manual_seed(1)
    generator = Generator(GRID.slices * len(MM_WHS), **GENERATOR)
    initialise([generator])
    intensity = Intensity("HU", -1024, 1024)
    return Manifest(
        NAME, MM_WHS, GRID, intensity, style=2, noise=True, files={}
    ), LabelsToIntensity(generator, len(MM_WHS), intensity)


def write_random_model(folder: Path) -> Manifest:
    """Write `random_graph` as model.onnx and model.fp16.onnx.

    Args:
        folder: The model folder.

    Returns:
        The manifest that was written.
    """
    from export.graph import to_fp16
    from export.to_onnx import to_onnx

    manifest, graph = random_graph()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, precision, exported in (
        ("model.onnx", "fp32", graph),
        ("model.fp16.onnx", "fp16", to_fp16(graph)),
    ):
        to_onnx(exported, manifest, folder / name)
        files[name] = ModelFile(
            "onnx", precision, (folder / name).stat().st_size, sha256_of(folder / name)
        )
    manifest = replace(manifest, files=files)
    write_json(folder / MANIFEST, manifest.to_json())
    return manifest


def draw(manifest: Manifest, count: int, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """Draw inputs on the canvas.

    Args:
        manifest: The model's manifest.
        count: The number of slices.
        seed: Of the random generator.

    Returns:
        Blocks of labels, noise and a style by name, where the model takes them.
    """
    rng = np.random.default_rng(seed)
    h, w = manifest.grid.canvas
    blocks = rng.integers(
        0, len(manifest.labels), (count, manifest.grid.slices, -(-h // 16), -(-w // 16)), np.uint8
    )
    inputs: dict[str, NDArray[np.generic]] = {
        "labels": np.ascontiguousarray(blocks.repeat(16, 2).repeat(16, 3)[:, :, :h, :w])
    }
    if manifest.style:
        inputs["style"] = rng.standard_normal((count, manifest.style), np.float32)
    if manifest.noise:
        inputs["noise"] = rng.integers(0, 256, (count, h, w), np.uint8)
    return inputs


def reference(
    manifest: Manifest, folder: Path, inputs: dict[str, NDArray[np.generic]]
) -> NDArray[np.int16]:
    """Run the FP32 graph in ONNX Runtime on the CPU.

    Args:
        manifest: The model's manifest.
        folder: The model folder.
        inputs: Arrays of N slices by name.

    Returns:
        int16 HU (N, H, W).
    """
    import onnxruntime

    name = manifest.file_of("onnx", "fp32")
    session = onnxruntime.InferenceSession(
        str(folder / str(name)), providers=["CPUExecutionProvider"]
    )
    rows = [
        session.run(None, {key: array[n : n + 1] for key, array in inputs.items()})[0]
        for n in range(len(inputs["labels"]))
    ]
    return hu(np.concatenate(rows))


def hu(pairs: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Read little-endian pairs of bytes.

    Args:
        pairs: uint8 (N, H, W, 2).

    Returns:
        int16 HU (N, H, W).
    """
    return np.ascontiguousarray(pairs).view("<i2")[..., 0]
