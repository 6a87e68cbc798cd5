"""`edge` computes in blocks and sums: the same function of the same parameters as its plain
formula, in training and in the exported file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_export import INNER, check_for_tensorrt
from test_proof import altered
from torch import Tensor, nn
from torch.nn import functional

from export import error_localization, parity
from export.graph import LabelsToIntensity, fuse_batch_norm, to_fp16
from export.to_onnx import to_onnx
from runtime.core.errors import ConfigError
from runtime.core.manifest import Manifest
from runtime.engines.registry import BACKENDS
from train.config import resolve
from train.networks.blocks import BlockConv2d
from train.networks.generator import Generator, initialise


def edge(
    slices: int = 1,
    *,
    filters: int = 8,
    depth: int = 3,
    skips: bool = True,
    textures: int = 3,
    style: int = 0,
) -> Generator:
    """With weights and statistics that leave no part of it without effect."""
    torch.manual_seed(0)
    net = Generator(
        8 * slices,
        kind="edge",
        filters=filters,
        depth=depth,
        skips=skips,
        textures=textures,
        texture_kernel=5,
        style=style,
    )
    initialise([net])
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.2)
    if textures:
        net.top.amplitudes.weight.data.mul_(20)
    net.top.image.bias.data.uniform_(-0.5, 0.5)
    return net.eval()


def plainly(
    net: Generator, condition: Tensor, noise: Tensor | None, style: Tensor | None
) -> Tensor:
    """Everything copied together, convolved at the resolution it has, and shuffled: what `edge`
    is said to compute.
    """
    kept = [condition]
    for stage in net.encoder:
        kept.append(stage(kept[-1]))
    x = kept.pop()
    for n, stage in enumerate(net.decoder):
        x, skip = stage(x), kept.pop()
        if style is not None:
            x = net.modulations[n](x, style)
        x = torch.cat([x, skip], 1) if net.skips else x
    join, *rest = net.top.join
    half = functional.conv2d(
        torch.cat([x, functional.pixel_unshuffle(condition, 2)], 1), join.weight
    )
    for layer in rest:
        half = layer(half)
    if style is not None:
        half = net.top.modulation(half, style)
    logits = functional.pixel_shuffle(
        functional.conv2d(half, net.top.image.weight, net.top.image.bias, padding=1), 2
    )
    if noise is not None:
        amplitudes = functional.pixel_shuffle(net.top.amplitudes(half), 2)
        logits = logits + (
            amplitudes * functional.conv2d(noise, net.texture.filters.weight, padding=2)
        ).sum(1, keepdim=True)
    if style is not None:
        logits = logits + (condition * net.contrast(style)[:, :, None, None]).sum(1, keepdim=True)
    return torch.sigmoid(logits)


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize(
    ("slices", "skips", "style"), [(1, True, 0), (1, False, 2), (3, True, 2), (5, True, 0)]
)
def test_edge_computes_its_plain_formula(slices: int, skips: bool, style: int, noisy: bool) -> None:
    net = edge(slices, skips=skips, style=style).double()
    condition = torch.rand(2, 8 * slices, 24, 40).double()
    noise = torch.randn(2, 1, 24, 40).double() if noisy else None
    vector = torch.randn(2, style).double() if style else None
    with torch.no_grad():
        _, image = net(condition, noise, vector)
        expected = plainly(net, condition, noise, vector)
        torch.testing.assert_close(
            image.double(), expected, atol=1e-7, rtol=0
        )  # logits are rounded to float32
        without = [net(condition, noise, None)[1]] * bool(style) + [
            net(condition, None, vector)[1]
        ] * noisy
        assert all((image - expected).abs().max() > 1e-2 for image in without), (
            "a part that synthesizes nothing shows nothing"
        )


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_block_convolution_equals_convolution(kernel: int, block: int) -> None:
    """The values and the gradients are those of the convolution."""
    torch.manual_seed(0)
    layer, x = BlockConv2d(3, 4, kernel, block).double(), torch.randn(2, 3, 12, 18).double()
    found = layer(x)
    expected = functional.pixel_unshuffle(
        functional.conv2d(x, layer.weight, layer.bias, padding=kernel // 2), block
    )
    torch.testing.assert_close(found, expected)
    ours, plain = (
        torch.autograd.grad((y**2).sum(), [layer.weight, layer.bias]) for y in (found, expected)
    )
    torch.testing.assert_close(ours, plain)


def test_edge_keeps_plain_formula_parameters() -> None:
    """Runs trained before the formula was rewritten load as they are."""
    state = edge(3, style=2).state_dict()
    found = {
        name: tuple(t.shape)
        for name, t in state.items()
        if name.startswith(("top.", "texture.")) and ".1." not in name and ".4." not in name
    }
    assert found == {
        "top.join.0.weight": (8, 16 + 4 * 24, 1, 1),
        "top.join.3.weight": (8, 1, 3, 3),
        "top.modulation.factors.weight": (16, 2),
        "top.image.weight": (4, 8, 3, 3),
        "top.image.bias": (4,),
        "top.amplitudes.weight": (12, 8, 1, 1),
        "top.amplitudes.bias": (12,),
        "texture.filters.weight": (3, 1, 5, 5),
    }


def test_edge_needs_two_stages() -> None:
    small = ["generator.kind=edge", "data.canvas=[32,32]", "discriminator.patch_size=8"]
    assert resolve({}, [*small, "generator.depth=2"]).generator.depth == 2
    with pytest.raises(ConfigError, match=r"generator\.depth is 1") as caught:
        resolve({}, [*small, "generator.depth=1"])
    assert "at least 2" in str(caught.value.expected)


@pytest.fixture(scope="module")
def exported(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LabelsToIntensity, Manifest, Path]:
    """Larger than the sizes up to which the exporter computes weights by itself."""
    trained = Manifest.load(model)
    manifest = replace(trained, style=2, grid=replace(trained.grid, canvas=(64, 64), divisor=4))
    graph = LabelsToIntensity(
        edge(trained.grid.slices, filters=64, depth=2, style=2),
        len(trained.labels),
        trained.intensity,
    )
    folder = tmp_path_factory.mktemp("edge")
    to_onnx(fuse_batch_norm(graph), manifest, folder / "model.onnx")
    to_onnx(to_fp16(fuse_batch_norm(graph)), manifest, folder / "model.fp16.onnx")
    return graph, manifest, folder


@pytest.mark.parametrize("file", INNER)
def test_edge_graph_has_constant_convolutions(
    file: str, exported: tuple[LabelsToIntensity, Manifest, Path]
) -> None:
    """The file's convolutions have constant weights, and its top concatenates nothing.

    A quantiser takes no other convolution.
    """
    path = exported[2] / file
    graph = onnx.load(path).graph
    constants = {t.name: t.dims for t in graph.initializer}
    convolutions = [n for n in graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 12 and all(n.input[1] in constants for n in convolutions)
    shapes = {n.name: list(constants[n.input[1]]) for n in convolutions}
    assert shapes["generator.texture.filters/Conv"] == [12, 1, 6, 6] and shapes[
        "generator.top.image/Conv"
    ] == [16, 64, 4, 4]
    assert {n for node in graph.node for n in node.input if n in constants} == set(constants), (
        "a weight that nothing reads"
    )
    assert not [
        n.name for n in graph.node if n.op_type == "Concat" and n.name.startswith("generator.top")
    ]
    check_for_tensorrt(path, INNER[file])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_edge_onnx_equals_network(
    precision: str, exported: tuple[LabelsToIntensity, Manifest, Path]
) -> None:
    """The file synthesizes what the network synthesizes."""
    graph, manifest, folder = exported
    labels = parity.random_labels(3, manifest.grid.slices, (32, 48), 8)
    truth = parity.reference(graph, parity.draw_inputs(manifest.inputs, labels))
    assert truth.values.std() > 50
    for backend in (b for b in BACKENDS if b.file == ("onnx", precision) and not b.uninstalled()):
        engine = backend.open(folder / model_file(precision), manifest)
        difference = np.abs(parity.run_engine(engine, truth.inputs)[0].astype(int) - truth.values)
        engine.close()
        assert difference.max() <= 1 if precision == "fp32" else difference.mean() <= 1, (
            backend.name
        )


@pytest.mark.parametrize(
    ("where", "region"),
    [
        ("generator.top.join.0/Conv", "top.join"),
        ("generator.top.image/Conv", "top.image"),
        ("generator.top.amplitudes/Conv", "top.amplitudes"),
        ("generator.texture.filters/Conv", "texture"),
    ],
)
def test_edge_defect_is_localized(
    where: str, region: str, exported: tuple[LabelsToIntensity, Manifest, Path], tmp_path: Path
) -> None:
    """The stage errors tell a defect in each part of the top from defects in the other parts."""
    graph, manifest, folder = exported
    inputs = parity.draw_inputs(
        manifest.inputs, parity.random_labels(2, manifest.grid.slices, (32, 32), 8)
    )
    sound = error_localization.stage_errors(graph, folder / "model.onnx", inputs)
    assert {"top.join", "top.modulation", "top.image", "top.amplitudes", "texture"} <= {
        r.name for r in sound
    }
    assert max(r.error for r in sound) < error_localization.ROUNDING["fp32"]
    path = tmp_path / "model.onnx"
    path.write_bytes((folder / "model.onnx").read_bytes())
    altered(path, where, lambda weights: weights * 1.5)
    assert (
        error_localization.worst_stage(
            error_localization.stage_errors(graph, path, inputs), "fp32"
        ).name
        == region
    )


def model_file(precision: str) -> str:
    return {"fp32": "model.onnx", "fp16": "model.fp16.onnx"}[precision]
