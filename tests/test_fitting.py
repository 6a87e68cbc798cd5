"""Layers fitted to INT8, on small networks of which all is known."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from export.quantize import Quantizer
from export.to_onnx import name_nodes
from export.weight_reconstruction import fake_quantize

SLICES, CLASSES = 12, 4
LAYERS = ("first/Conv", "spread/Conv", "mix/Conv", "last/Conv")


class Network(nn.Module):
    """A wide convolution, a depthwise one and two 1x1 ones, as `edge` has them.

    `scales`: of the channels between the first two.
    """

    def __init__(self, scales: torch.Tensor):
        super().__init__()
        self.first = nn.Conv2d(CLASSES, 16, 3, padding=1)
        self.spread = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mix, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)
        with torch.no_grad():
            self.first.weight.mul_(scales[:, None, None, None])
            self.first.bias.mul_(scales)  # type: ignore[union-attr]
            self.spread.weight.div_(scales[:, None, None, None])

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        condition = (labels[..., None] == torch.arange(CLASSES)).float().permute(0, 3, 1, 2)
        x = nn.functional.leaky_relu(self.first(condition), 0.2)
        return self.last(self.mix(self.spread(x).relu()).relu())


def labels(seed: int) -> dict[str, np.ndarray]:
    """Maps of flat regions."""
    return {
        "labels": (
            np.random.default_rng(seed)
            .integers(0, CLASSES, (SLICES, 5, 5), np.uint8)
            .repeat(8, 1)
            .repeat(8, 2)
        )
    }


def exported(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            network,
            (torch.from_numpy(labels(0)["labels"]),),
            dynamo=True,
            opset_version=21,
            input_names=["labels"],
            output_names=["y"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    name_nodes(model.graph)
    onnx.save(model, path)
    return path


def generated(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    (y,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)
    return np.asarray(y)


def error(path: Path, network: nn.Module, inputs: dict[str, np.ndarray]) -> float:
    """The root mean square of what differs over that of the network's values."""
    with torch.inference_mode():
        truth = network(torch.from_numpy(inputs["labels"])).numpy()
    return float(np.sqrt(np.square(generated(path, inputs) - truth).mean() / truth.var()))


@pytest.fixture(params=[False, True], ids=["alike", "apart"])
def network(request: pytest.FixtureRequest) -> Network:
    """Channels of one range, or of ranges up to a hundred times apart."""
    torch.manual_seed(0)
    return Network(torch.logspace(-1, 1, 16) if request.param else torch.ones(16)).eval()


def test_int8_fit_generalizes_to_slices(network: Network, tmp_path: Path) -> None:
    """On slices to which it was not fitted the error is a fraction of the error before."""
    quantizer, path = (
        Quantizer(exported(network, tmp_path / "fp32.onnx"), labels(0)),
        tmp_path / "int8.onnx",
    )
    quantizer.write(path, ())
    before = error(path, network, labels(2))
    quantizer.fitted(network, labels(1)).write(path, ())
    assert all(
        node.op_type != "Conv" or node.input[1].endswith("DequantizeLinear_Output")
        for node in onnx.load(path).graph.node
    )
    assert 1e-5 < error(path, network, labels(2)) < 0.7 * before


def test_float_layer_corrects_earlier_errors(network: Network, tmp_path: Path) -> None:
    """A layer that stays in float corrects errors of the layers before it."""
    quantizer, path = (
        Quantizer(exported(network, tmp_path / "fp32.onnx"), labels(0)),
        tmp_path / "int8.onnx",
    )
    quantizer.write(path, ("mix/Conv",))
    before = error(path, network, labels(2))
    quantizer.fitted(network, labels(1), ("mix/Conv",)).write(path, ("mix/Conv",))
    assert error(path, network, labels(2)) < 0.7 * before


def test_float_fit_is_the_network(network: Network, tmp_path: Path) -> None:
    """With all layers in float the fitted graph is the network itself."""
    quantizer, path = (
        Quantizer(exported(network, tmp_path / "fp32.onnx"), labels(0)),
        tmp_path / "float.onnx",
    )
    quantizer.fitted(network, labels(1), LAYERS).write(path, LAYERS)
    assert error(path, network, labels(2)) < 1e-5


def test_equal_inputs_give_equal_file(network: Network, tmp_path: Path) -> None:
    source = exported(network, tmp_path / "fp32.onnx")
    for name in ("a", "b"):
        Quantizer(source, labels(0)).fitted(network, labels(1)).write(tmp_path / name, ())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_fit_refuses_foreign_network(network: Network, tmp_path: Path) -> None:
    """A network from which the graph does not come is refused."""
    quantizer = Quantizer(exported(network, tmp_path / "fp32.onnx"), labels(0))
    with pytest.raises(ValueError, match="the graph's weights of first/Conv are not the network's"):
        quantizer.fitted(Network(torch.full((16,), 2.0)).eval(), labels(1))


def test_int8_fit_of_zero_inputs(tmp_path: Path) -> None:
    """A layer that reads zeros alone is fitted as well.

    As in a network that died in training: its file is to be validated like any other.
    """
    torch.manual_seed(0)
    dead = Network(torch.ones(16)).eval()
    with torch.no_grad():
        dead.spread.bias.fill_(-1e3)  # type: ignore[union-attr]
        dead.last.bias[0] = 0.5  # type: ignore[index]
    Quantizer(exported(dead, tmp_path / "fp32.onnx"), labels(0)).fitted(dead, labels(1)).write(
        tmp_path / "int8.onnx", ()
    )
    with torch.inference_mode():
        truth = dead(torch.from_numpy(labels(2)["labels"])).numpy()
    np.testing.assert_allclose(
        generated(tmp_path / "int8.onnx", labels(2)), truth, rtol=0, atol=0.02
    )


class Grouped(nn.Module):
    """Two channels an output of four groups, with gaps between the taps, after channels of
    ranges far apart.
    """

    def __init__(self) -> None:
        super().__init__()
        scales = torch.logspace(-1, 1, 8)
        self.first, self.second = (
            nn.Conv2d(CLASSES, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
        )
        with torch.no_grad():
            self.first.weight.mul_(scales[:, None, None, None])
            self.first.bias.mul_(scales)  # type: ignore[union-attr]
            self.second.weight.div_(
                scales.view(4, 1, 2, 1, 1).expand(4, 2, 2, 1, 1).reshape(8, 2, 1, 1)
            )

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        condition = (labels[..., None] == torch.arange(CLASSES)).float().permute(0, 3, 1, 2)
        return self.second(self.first(condition).relu())


def test_grouped_dilated_convolutions_are_fitted(tmp_path: Path) -> None:
    """Groups of several channels and gaps between taps are fitted too."""
    torch.manual_seed(0)
    network = Grouped().eval()
    quantizer, path = (
        Quantizer(exported(network, tmp_path / "fp32.onnx"), labels(0)),
        tmp_path / "int8.onnx",
    )
    quantizer.write(path, ())
    before = error(path, network, labels(2))
    quantizer.fitted(network, labels(1)).write(path, ())
    assert error(path, network, labels(2)) < 0.7 * before


class Branched(nn.Module):
    """Two branches of one shape, which any order of the nodes computes alike."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Conv2d(CLASSES, 8, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        condition = (labels[..., None] == torch.arange(CLASSES)).float().permute(0, 3, 1, 2)
        return self.last(self.left(condition).relu() + self.right(condition).relu())


def fitted_weights(network: nn.Module, source: Path) -> dict[str, np.ndarray]:
    """The reconstructed weights and biases that the INT8 graph of `source` is made of, by name."""
    model = Quantizer(source, labels(0)).fitted(network, labels(1))._model
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if "/fitted/" in tensor.name
    }


def test_order_of_nodes_changes_no_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Branched().eval()
    source = exported(network, tmp_path / "fp32.onnx")
    expected = fitted_weights(network, source)
    model = onnx.load(source)
    nodes = list(model.graph.node)
    left, right = (
        next(n for n, node in enumerate(nodes) if node.name == name)
        for name in ("left/Conv", "right/Conv")
    )
    nodes.insert(left, nodes.pop(right))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "other.onnx")
    weights = fitted_weights(network, tmp_path / "other.onnx")
    assert weights.keys() == expected.keys() and len(expected) == 2 * 3
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


def test_unknown_layer_is_refused(network: Network, tmp_path: Path) -> None:
    quantizer = Quantizer(exported(network, tmp_path / "fp32.onnx"), labels(0))
    network.added = network.last
    network.last = nn.Identity()
    with pytest.raises(ValueError, match="the network has no layer last/Conv"):
        quantizer.fitted(network, labels(1))


def test_int8_range_holds_zero_exactly() -> None:
    """Eight bits hold zero exactly and end at the range."""
    x = torch.tensor([-2.0, -0.5, 0.0, 0.004, 1.5, 9.0])
    held = fake_quantize(x, -1.0, 1.55)
    np.testing.assert_allclose(held, [-1.0, -0.5, 0.0, 0.0, 1.5, 1.55], atol=1e-6)
