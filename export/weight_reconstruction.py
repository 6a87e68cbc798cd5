"""Reconstruction of a layer's weights for INT8, by least squares: no training, no seed.

First the channels of a tensor are brought nearer to one range, because its 8 bits cover one range
(Xiao et al., "SmoothQuant", ICML 2023); the layers before and after take the factors. Then each
layer, in the order of the network, gets the weights whose output on the quantized inputs is nearest
to the FP32 output (Hubara et al., "Accurate Post Training Quantization With Small Calibration
Sets", ICML 2021). The quantized inputs carry the errors of all layers before. Weights are rounded
one by one, and those not yet rounded make up for the error (Frantar et al., "GPTQ", ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .to_onnx import NodeNames

# Each channel is divided by its range to this power: 1 would make all ranges alike, but spread the
# weights further apart.
SMOOTHQUANT_ALPHA = 0.75
# How strongly the solution is drawn to the old weights, as a share of an input's mean square.
RIDGE = 0.2
# A share of an input's mean square. It keeps the error of a rounding from being spread over inputs
# that hardly differ.
GPTQ_DAMPING = 0.003
# The most weights of one output that are solved for. Larger and transposed layers get a bias only.
MAX_WEIGHTS = 600
SAMPLES = 2**18  # pixels of all slices that a layer is fitted at
# Operators whose output scales with their inputs, channel by channel.
HOMOGENEOUS = ("Relu", "LeakyRelu", "Resize", "Add")
_ONNX_OPERATORS = {functional.conv2d: "Conv", functional.conv_transpose2d: "ConvTranspose"}
# PyTorch's positional arguments after the input and the weights.
_ARGUMENTS = {
    functional.conv2d: ["bias", "stride", "padding", "dilation", "groups"],
    functional.conv_transpose2d: [
        "bias",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
    ],
}


class ActivationSteps(NamedTuple):
    """How an INT8 file holds the tensor that a layer reads.

    Attributes:
        lowest: The lowest step, 0 or less.
        highest: The highest step.
        symmetric: 0 is the step 0, and both ends of the range are as far from it.
        rounds_bias: Biases are INT32, in steps of inputs times weights; else FP32.
    """

    lowest: int
    highest: int
    symmetric: bool
    rounds_bias: bool

    def size(self, low: float, high: float) -> float:
        """The step of a range; ONNX Runtime uses a step of 1 where a tensor is always 0.

        Args:
            low: The lower end of the range, at most 0.
            high: The upper end of the range, at least 0.
        """
        if self.symmetric:
            return max(-low, high) / self.highest or 1.0
        return (high - low) / (self.highest - self.lowest) or 1.0


ASYMMETRIC = ActivationSteps(0, 255, symmetric=False, rounds_bias=True)
SYMMETRIC = ActivationSteps(-128, 127, symmetric=True, rounds_bias=False)


class ReconstructedWeights(NamedTuple):
    """A layer's new weights and bias, float32.

    Attributes:
        weights: The old weights' shape; multiples of each output's step where solved for.
        bias: (C_out,).
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]


class _ConvolutionCalls(TorchFunctionMode):
    """Lets `visit` compute every convolution of `network`, and tells it the layer's name.

    The name is the one that `to_onnx.name_nodes` gives to the convolution's ONNX node: the module
    that is running, and the operator. `visit` is called as
    `visit(name, operator, x, weights, bias, options)` and returns the convolution's output.
    """

    def __init__(self, network: nn.Module, visit: Callable[..., Tensor]):
        super().__init__()
        self._network, self._visit = network, visit
        self._names = NodeNames()
        self._running: list[str] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> _ConvolutionCalls:
        for name, module in self._network.named_modules():
            if name:
                self._hooks.append(module.register_forward_pre_hook(self._on_entry(name)))
                self._hooks.append(module.register_forward_hook(self._on_exit))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _on_entry(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._running.append(name)

        return hook

    def _on_exit(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ONNX_OPERATORS:
            return func(*args, **(kwargs or {}))
        x, weights, *rest = args
        options = {**dict(zip(_ARGUMENTS[func], rest, strict=False)), **(kwargs or {})}
        name = self._names.next(self._running[-1] if self._running else "", _ONNX_OPERATORS[func])
        return self._visit(name, func, x, weights, options.pop("bias", None), options)


def reconstruct_weights(
    network: nn.Module,
    graph: onnx.GraphProto,
    ranges: Mapping[str, tuple[float, float] | None],
    inputs: Mapping[str, NDArray[Any]],
    floating: Collection[str] = (),
    steps: ActivationSteps = ASYMMETRIC,
) -> dict[str, ReconstructedWeights]:
    """Compute new weights for the layers of `graph` that INT8 inference will read.

    Layers of the network and nodes of the graph are matched by name, so that the order of the
    graph's nodes does not matter.

    Args:
        network: The PyTorch network that `graph` was exported from.
        graph: The FP32 graph; `to_onnx.name_nodes` named its nodes.
        ranges: Of every layer, by the name of its node: the range of the activation that it
            reads, or None where the activation is exact. The new weights fit these ranges.
        inputs: The network's inputs by name, arrays of n slices.
        floating: The layers that stay FP32. They make up for the errors of the layers before.
        steps: How the file holds activations and biases.

    Returns:
        The new weights by layer.

    Raises:
        ValueError: A layer of the network is missing in the graph or has other weights there.
    """
    nodes = {node.name: node for node in graph.node}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()
    }
    extents: dict[str, tuple[Tensor, Tensor]] = {}

    def measure_extent(
        name: str,
        operator: Any,
        x: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        if name not in ranges:
            raise ValueError(f"the graph has no layer {name}")
        graph_weights = numpy_helper.to_array(constants[nodes[name].input[1]])
        same_shape = graph_weights.shape == weights.shape
        if not same_shape or not np.allclose(graph_weights, weights.numpy(), atol=1e-6):
            raise ValueError(f"the graph's weights of {name} are not the network's")
        extents[name] = x.amin((0, 2, 3)), x.amax((0, 2, 3))
        return operator(x, weights, bias, **options)  # type: ignore[no-any-return]

    with torch.inference_mode(), _ConvolutionCalls(network, measure_extent):
        network(**tensors)
    if missing := ranges.keys() - extents.keys():
        raise ValueError(f"the network has no layer {min(missing)}")
    factors = _channel_factors(graph, ranges, extents)
    reconstructed: dict[str, ReconstructedWeights] = {}

    def solve(
        name: str,
        operator: Any,
        x: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Solve a layer; the batch is the FP32 network's slices, then the INT8 one's."""
        x_float, x_int8 = x.chunk(2)
        float_output = operator(x_float, weights, bias, **options)
        input_factors = factors.get(nodes[name].input[0])
        output_factors = factors.get(nodes[name].output[0])
        transposed, start, target = operator is functional.conv_transpose2d, weights, float_output
        if input_factors is not None:
            # transposed weights are (C_in, C_out, h, w)
            groups = 1 if transposed else options.get("groups", 1)
            shape = (-1, 1, 1, 1) if transposed else (groups, 1, -1, 1, 1)
            by_group = start.view(groups, -1, *start.shape[1:])
            start = (by_group * input_factors.view(shape)).view(start.shape)
        if output_factors is not None:
            start = start / output_factors.view((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
            target = float_output / output_factors.view(1, -1, 1, 1)
        span, quantized = ranges[name], name not in floating
        layer_input = x_int8
        if quantized and span is not None:
            layer_input = fake_quantize(x_int8, *span, steps)
        if not transposed and start[0].numel() <= MAX_WEIGHTS:
            new_weights = _least_squares(layer_input, start, target, options, quantized)
        elif not quantized:
            new_weights = start
        else:
            new_weights = torch.from_numpy(rounded(start.numpy(), transposed))
        output = operator(layer_input, new_weights, None, **options)
        shift = (target - output).mean((0, 2, 3))
        # INT8 engines round a bias to steps of inputs times weights. Flat regions would fall on
        # another step if it were not rounded here.
        if quantized and steps.rounds_bias:
            largest = new_weights.abs().amax((0, 2, 3) if transposed else (1, 2, 3))
            step = steps.size(*(span or (0, 1))) * torch.where(largest > 0, largest / 127, 1)
            shift = torch.round(shift / step) * step
        reconstructed[name] = ReconstructedWeights(new_weights.numpy(), shift.numpy())
        return torch.cat([float_output, output + shift.view(1, -1, 1, 1)])

    with torch.inference_mode(), _ConvolutionCalls(network, solve):
        network(**{name: torch.cat([array, array]) for name, array in tensors.items()})
    return reconstructed


def fake_quantize(
    x: Tensor, low: float, high: float, steps: ActivationSteps = ASYMMETRIC
) -> Tensor:
    """Round `x` as an INT8 tensor would hold it (Jacob et al., CVPR 2018).

    Args:
        x: float32, any shape.
        low: The lower end of the range, at most 0.
        high: The upper end of the range, at least 0.
        steps: How the file holds it.

    Returns:
        float32 of the same shape. 0 is one of the steps.
    """
    step = steps.size(low, high)
    zero = 0 if steps.symmetric else round(-low / step)
    level = torch.clamp(torch.round(x / step) + zero, steps.lowest, steps.highest)
    return (level - zero) * step


def _channel_factors(
    graph: onnx.GraphProto,
    ranges: Mapping[str, tuple[float, float] | None],
    extents: Mapping[str, tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """By tensor, the factors (C,) that SmoothQuant divides its channels by.

    Only tensors between layers have factors. Tensors that an Add or another homogeneous operator
    joins share theirs.
    """
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    fixed = {tensor.name for tensor in graph.output}
    constants = {tensor.name for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    for node in graph.node:
        passed = node.input[: 2 if node.op_type == "Add" else 1]
        if node.op_type in HOMOGENEOUS and not constants.intersection(passed):
            for name in passed:
                root[find(name)] = find(node.output[0])
        elif node.name not in ranges:
            fixed.update(node.input, node.output)
    fixed = {find(name) for name in fixed}
    layer_outputs = {find(nodes[layer].output[0]) for layer in ranges}
    shares: dict[str, Tensor] = {}
    for layer, span in ranges.items():
        low, high = extents[layer]
        key = find(nodes[layer].input[0])
        if span is not None and key in layer_outputs - fixed:
            share = torch.maximum(
                low / min(span[0], -1e-9) if span[0] < 0 else torch.zeros_like(low),
                high / max(span[1], 1e-9),
            )
            shares[key] = torch.maximum(shares.get(key, torch.full_like(share, 1e-3)), share)
    return {
        name: shares[find(name)] ** SMOOTHQUANT_ALPHA for name in list(root) if find(name) in shares
    }


def _least_squares(
    x: Tensor, weights: Tensor, target: Tensor, options: Mapping[str, Any], quantized: bool
) -> Tensor:
    """The weights whose output on `x` is nearest to `target`, for the best bias.

    `quantized`: the weights are multiples of each output's step.
    """
    groups, (outputs, *kernel) = options.get("groups", 1), weights.shape
    size = int(np.prod(kernel))
    start = weights.reshape(groups, outputs // groups, size)
    # odd, so that the samples are not always in the same columns of the image
    every = max(1, len(x) * target[0, 0].numel() // SAMPLES) | 1
    unfold_options = {
        name: options[name] for name in ("padding", "stride", "dilation") if name in options
    }
    square = torch.zeros(groups, size + 1, size + 1, dtype=torch.float64)
    missing = torch.zeros(groups, size + 1, outputs // groups, dtype=torch.float64)
    for image, image_target in zip(x.split(1), target, strict=True):
        taps = functional.unfold(image, tuple(kernel[1:]), **unfold_options)
        taps = taps.view(groups, size, -1)[..., ::every]
        residual = image_target.reshape(groups, outputs // groups, -1)[..., ::every] - start @ taps
        taps = torch.cat([taps, torch.ones(groups, 1, taps.shape[2])], 1)
        square += (taps @ taps.mT).double()
        missing += (taps @ residual.mT).double()
    # the mean of each tap, which the bias takes
    mean = square[:, :-1, -1:] / square[:, -1:, -1:]
    covariance = square[:, :-1, :-1] - mean * square[:, -1:, :-1]
    toward = missing[:, :-1] - mean * missing[:, -1:]
    diagonal = torch.diagonal(square[:, :-1, :-1], dim1=1, dim2=2)
    power = diagonal.mean(1).clamp(min=1e-9)[:, None, None]
    eye = torch.eye(size, dtype=torch.float64)
    solution = start.double() + torch.linalg.solve(covariance + RIDGE * power * eye, toward).mT
    if quantized:
        solution = _round_one_by_one(solution, covariance + GPTQ_DAMPING * power * eye)
    return solution.float().reshape(weights.shape)


def _round_one_by_one(weights: Tensor, square: Tensor) -> Tensor:
    """Round `weights` (G, C_out, K) to multiples of each output's step, its largest / 127 (GPTQ).

    The weights after a rounded one take back the error that inputs with the second moments
    `square` (G, K, K) would see.
    """
    step = weights.abs().amax(2, keepdim=True).clamp(min=1e-30) / 127
    scaled = weights / step
    largest = scaled.abs().argmax(2)
    ends = 127 * torch.sign(scaled.gather(2, largest[..., None]))[..., 0]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    spread = torch.linalg.cholesky(inverse, upper=True)
    for k in range(scaled.shape[2]):
        nearest = torch.round(scaled[..., k]).clamp(-127, 127)
        # the largest weight keeps its value, because it defines the step
        rounded_weight = torch.where(largest == k, ends, nearest)
        error = (scaled[..., k] - rounded_weight) / spread[:, k, k, None]
        scaled[..., k + 1 :] -= error[..., None] * spread[:, None, k, k + 1 :]
        scaled[..., k] = rounded_weight
    return scaled * step


def rounded(weights: NDArray[np.float32], transposed: bool = False) -> NDArray[np.float32]:
    """Round weights to each output channel's steps, and keep the sum of every kernel's taps.

    Where labels are flat a kernel sees one value, so that only the sum of its taps counts. The sum
    is kept to half a step. A step is the channel's largest weight / 127.

    Args:
        weights: float32 (C_out, C_in, h, w), or (C_in, C_out, h, w) if `transposed`.
        transposed: Whether they belong to a transposed convolution.

    Returns:
        float32 of the same shape.
    """
    if transposed:
        return np.ascontiguousarray(rounded(weights.swapaxes(0, 1)).swapaxes(0, 1))
    step = np.maximum(np.abs(weights).max((1, 2, 3), keepdims=True), 1e-30) / 127
    exact = (weights / step).reshape(-1, weights[0, 0].size).astype(np.float64)
    steps = np.rint(exact)
    lost = np.rint((exact - steps).sum(1)).astype(int)  # steps that rounding took from the sum
    wrong = np.sign(lost)[:, None] * (exact - steps)
    # the weights that were rounded furthest the wrong way come first
    rank = np.argsort(np.argsort(-wrong, 1, kind="stable"), 1, kind="stable")
    steps += np.sign(lost)[:, None] * (rank < np.abs(lost)[:, None])
    return (np.clip(steps, -127, 127).reshape(weights.shape) * step).astype(np.float32)
