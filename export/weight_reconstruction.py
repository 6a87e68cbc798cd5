"""Layers fitted to INT8: what the float network gives is put back together from inputs that are
held in 8 bits.

First all channels of a tensor are brought nearer to one range, which its 8 bits are of (Xiao et
al., "SmoothQuant", ICML 2023; the layers before and after take the factors). Then layer after layer
gets the weights by which the inputs that it will read, errors of all layers before it and all, come
nearest to what the float layer gives for its own (Hubara et al., "Accurate Post Training
Quantization With Small Calibration Sets", ICML 2021), rounded one by one, of which those still to
be rounded take the error back (Frantar et al., "GPTQ", ICLR 2023). Least squares: no training, no
seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .graph import LabelsToIntensity

# the power of each channel's range that is taken out of it: 1 would leave all alike, and weights
# further apart
SMOOTHQUANT_ALPHA = 0.75
RIDGE = 0.2  # by how much weights are held where they were, of an input's mean square
# of an input's mean square, so that the error of a rounding is not spread over inputs that hardly
# differ
GPTQ_DAMPING = 0.003
# weights of one output that are solved for; layers with more (and transposed ones) get a bias only
MAX_WEIGHTS = 600
SAMPLES = 2**18  # places that a layer is fitted at, of all slices
HOMOGENEOUS = (
    "Relu",
    "LeakyRelu",
    "Resize",
    "Add",
)  # of inputs times a channel's factor, their output is the output times it
_ORDER = {
    functional.conv2d: ("bias", "stride", "padding", "dilation", "groups"),
    functional.conv_transpose2d: (
        "bias",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
    ),
}


class ReconstructedWeights(NamedTuple):
    """A layer's new weights (the old ones' shape), multiples of each output's step where they
    were solved for, and bias (C_out,); float32.
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]


class _Calls(TorchFunctionMode):
    """Has `visit(n, operator, x, weights, bias, options)` stand for the n-th convolution: one
    call for each node of the ONNX graph, in its order.
    """

    def __init__(self, visit: Callable[..., Tensor]):
        super().__init__()
        self._visit, self.count = visit, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ORDER:
            return func(*args, **(kwargs or {}))
        x, weights, *rest = args
        options = {**dict(zip(_ORDER[func], rest, strict=False)), **(kwargs or {})}
        self.count += 1
        return self._visit(self.count - 1, func, x, weights, options.pop("bias", None), options)


def fit(
    network: LabelsToIntensity,
    graph: onnx.GraphProto,
    layers: Sequence[str],
    ranges: Sequence[tuple[float, float] | None],
    inputs: Mapping[str, NDArray[Any]],
    floating: Collection[str] = (),
) -> dict[str, ReconstructedWeights]:
    """New weights of `graph`'s `layers`, by name, all of which are to be INT8 but those `floating`,
    which take back errors of those before them.

    `network`: what the graph was exported from; `ranges`: of what each layer reads, None where it
    is exact (kept, the new weights fit them); `inputs`: the network's, of n slices. Raises
    `ValueError` where network and graph do not agree.
    """
    nodes = {node.name: node for node in graph.node}
    held = {tensor.name: tensor for tensor in graph.initializer}
    torches = {
        name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()
    }
    extents: list[tuple[Tensor, Tensor]] = []

    def look(
        n: int,
        operator: Any,
        x: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        known = numpy_helper.to_array(held[nodes[layers[n]].input[1]]) if n < len(layers) else None
        if (
            known is None
            or known.shape != weights.shape
            or not np.allclose(known, weights.numpy(), atol=1e-6)
        ):
            raise ValueError(f"convolution {n} of the network is not the graph's")
        extents.append((x.amin((0, 2, 3)), x.amax((0, 2, 3))))
        return operator(x, weights, bias, **options)  # type: ignore[no-any-return]

    with torch.inference_mode(), _Calls(look):
        network(**torches)
    factors = _factors(graph, layers, ranges, extents)
    found: dict[str, ReconstructedWeights] = {}

    def solve(
        n: int,
        operator: Any,
        x: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Of the batch, the first half is the float network's, the second the INT8 one's."""
        x_float, x_int8 = x.chunk(2)
        given = operator(x_float, weights, bias, **options)
        read, made = (
            factors.get(name) for name in (nodes[layers[n]].input[0], nodes[layers[n]].output[0])
        )
        transposed, start, wanted = operator is functional.conv_transpose2d, weights, given
        if read is not None:
            groups = (
                1 if transposed else options.get("groups", 1)
            )  # transposed weights are (C_in, C_out, h, w)
            each = read.view((-1, 1, 1, 1) if transposed else (groups, 1, -1, 1, 1))
            start = (start.view(groups, -1, *start.shape[1:]) * each).view(start.shape)
        if made is not None:
            start = start / made.view((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
            wanted = given / made.view(1, -1, 1, 1)
        span, whole = ranges[n], layers[n] not in floating
        seen = fake_quantize(x_int8, *span) if whole and span is not None else x_int8
        if not transposed and start[0].numel() <= MAX_WEIGHTS:
            fitting = _solved(seen, start, wanted, options, whole)
        elif not whole:
            fitting = start
        else:
            fitting = torch.from_numpy(rounded(start.numpy(), transposed))
        out = operator(seen, fitting, None, **options)
        shift = (wanted - out).mean((0, 2, 3))
        # a bias is held in steps of inputs times weights; flat regions would come to lie on another
        # step without
        if whole:
            largest = fitting.abs().amax((0, 2, 3) if transposed else (1, 2, 3))
            step = _step(*(span or (0, 1))) * torch.where(largest > 0, largest / 127, 1)
            shift = torch.round(shift / step) * step
        found[layers[n]] = ReconstructedWeights(fitting.numpy(), shift.numpy())
        return torch.cat([given, out + shift.view(1, -1, 1, 1)])

    with torch.inference_mode(), _Calls(solve):
        network(**{name: torch.cat([array, array]) for name, array in torches.items()})
    return found


def fake_quantize(x: Tensor, low: float, high: float) -> Tensor:
    """`x` as an unsigned INT8 tensor of that range holds it; 0 is one of its steps (Jacob et
    al., CVPR 2018).
    """
    step = _step(low, high)
    zero = round(-low / step)
    return (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step


def _step(low: float, high: float) -> float:
    """Of a range; ONNX Runtime holds what is always 0 in steps of 1."""
    return (high - low) / 255 or 1.0


def _factors(
    graph: onnx.GraphProto,
    layers: Sequence[str],
    ranges: Sequence[tuple[float, float] | None],
    extents: Sequence[tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """What each channel is divided by, (C,), for the tensors that lie between layers alone: by
    name, the same for all that must have the same.
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
        elif node.name not in layers:
            fixed.update(node.input, node.output)
    fixed = {find(name) for name in fixed}
    made = {find(nodes[layer].output[0]) for layer in layers}
    shares: dict[str, Tensor] = {}
    for layer, span, (low, high) in zip(layers, ranges, extents, strict=True):
        key = find(nodes[layer].input[0])
        if span is not None and key in made - fixed:
            share = torch.maximum(
                low / min(span[0], -1e-9) if span[0] < 0 else torch.zeros_like(low),
                high / max(span[1], 1e-9),
            )
            shares[key] = torch.maximum(shares.get(key, torch.full_like(share, 1e-3)), share)
    return {
        name: shares[find(name)] ** SMOOTHQUANT_ALPHA for name in list(root) if find(name) in shares
    }


def _solved(
    x: Tensor, weights: Tensor, wanted: Tensor, options: Mapping[str, Any], whole: bool
) -> Tensor:
    """Weights, `whole`: in 8 bits, by which `x` comes nearest to `wanted`, whatever the bias."""
    groups, (outputs, *kernel) = options.get("groups", 1), weights.shape
    size = int(np.prod(kernel))
    start = weights.reshape(groups, outputs // groups, size)
    every = (
        max(1, len(x) * wanted[0, 0].numel() // SAMPLES) | 1
    )  # odd: not always the same columns of the image
    square = torch.zeros(groups, size + 1, size + 1, dtype=torch.float64)
    missing = torch.zeros(groups, size + 1, outputs // groups, dtype=torch.float64)
    for one, target in zip(x.split(1), wanted, strict=True):
        taps = functional.unfold(
            one,
            tuple(kernel[1:]),
            **{
                name: options[name] for name in ("padding", "stride", "dilation") if name in options
            },
        )
        taps = taps.view(groups, size, -1)[..., ::every]
        residual = target.reshape(groups, outputs // groups, -1)[..., ::every] - start @ taps
        taps = torch.cat([taps, torch.ones(groups, 1, taps.shape[2])], 1)
        square += (taps @ taps.mT).double()
        missing += (taps @ residual.mT).double()
    mean = square[:, :-1, -1:] / square[:, -1:, -1:]  # of each tap; the bias takes it
    covariance = square[:, :-1, :-1] - mean * square[:, -1:, :-1]
    toward = missing[:, :-1] - mean * missing[:, -1:]
    power = (
        torch.diagonal(square[:, :-1, :-1], dim1=1, dim2=2).mean(1).clamp(min=1e-9)[:, None, None]
    )
    eye = torch.eye(size, dtype=torch.float64)
    better = start.double() + torch.linalg.solve(covariance + RIDGE * power * eye, toward).mT
    if whole:
        better = _in_steps(better, covariance + GPTQ_DAMPING * power * eye)
    return better.float().reshape(weights.shape)


def _in_steps(weights: Tensor, square: Tensor) -> Tensor:
    """`weights` (G, C_out, K) at multiples of each output's step, its largest / 127, rounded one by
    one: those after take the error back that the inputs of `square` (G, K, K) would see.
    """
    step = weights.abs().amax(2, keepdim=True).clamp(min=1e-30) / 127
    left = weights / step
    largest, ends = (
        left.abs().argmax(2),
        127 * torch.sign(left.gather(2, left.abs().argmax(2, keepdim=True)))[..., 0],
    )
    spread = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(square)), upper=True
    )
    for k in range(left.shape[2]):
        whole = torch.where(
            largest == k, ends, torch.round(left[..., k]).clamp(-127, 127)
        )  # the largest stays: it gives the step
        error = (left[..., k] - whole) / spread[:, k, k, None]
        left[..., k + 1 :] -= error[..., None] * spread[:, None, k, k + 1 :]
        left[..., k] = whole
    return left * step


def rounded(weights: NDArray[np.float32], transposed: bool = False) -> NDArray[np.float32]:
    """`weights` (C_out, C_in, h, w), `transposed` (C_in, C_out, h, w), at multiples of each output
    channel's step, its largest / 127, so that the taps of every kernel keep their sum to half a
    step: where labels are flat a kernel sees one value, and only the sum of its taps counts.
    """
    if transposed:
        return np.ascontiguousarray(rounded(weights.swapaxes(0, 1)).swapaxes(0, 1))
    step = np.maximum(np.abs(weights).max((1, 2, 3), keepdims=True), 1e-30) / 127
    exact = (weights / step).reshape(-1, weights[0, 0].size).astype(np.float64)
    whole = np.rint(exact)
    missing = np.rint((exact - whole).sum(1)).astype(int)  # steps that rounding took from the sum
    wrong = np.sign(missing)[:, None] * (exact - whole)
    rank = np.argsort(
        np.argsort(-wrong, 1, kind="stable"), 1, kind="stable"
    )  # those first that were rounded the most the wrong way
    whole += np.sign(missing)[:, None] * (rank < np.abs(missing)[:, None])
    return (np.clip(whole, -127, 127).reshape(weights.shape) * step).astype(np.float32)
