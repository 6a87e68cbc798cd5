"""Distances between two sets of slices in the features of a fixed random network.

A network of random convolutions needs no download and no training on natural images, and its
features see edges, texture and their arrangement (Soloveitchik et al., "Conditional Fréchet
Inception Distance", 2021, and Naeem et al., "Reliable Fidelity and Diversity Metrics", ICML 2020,
use random networks so). Its weights come from a fixed seed: the figures of two runs compare.

Each feature is divided by its standard deviation over the real slices, so the distances have no
unit. They grow where there are few slices. Compare them only with the same distance between two
real groups of as many slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Channels of the layers; the image is halved after each of them.
WIDTHS = (8, 16, 32)
SEED = 20_261_130
# HU that become 1: the inputs lie within about -1 and 1.
SCALE_HU = 1000.0
LEAK = 0.2
# What a batch may hold, so that large slices do not need much memory.
PIXELS_AT_ONCE = 1 << 20
# The least standard deviation of a feature, as a share of the greatest one's.
LEAST_DEVIATION = 1e-3
# Fewer slices have no covariance to speak of.
LEAST_SLICES = 2


def _weights() -> Iterator[tuple[Tensor, Tensor]]:
    """Kernels and biases of each layer, from the fixed seed."""
    random = torch.Generator().manual_seed(SEED)
    channels = 1
    for width in WIDTHS:
        kernel = torch.randn(width, channels, 3, 3, generator=random)
        bias = 0.1 * torch.randn(width, generator=random)
        yield kernel * (2 / (9 * channels)) ** 0.5, bias
        channels = width


def features(planes: NDArray[Any]) -> NDArray[np.float64]:
    """Compute mean and standard deviation of every channel of the random network.

    Args:
        planes: (n, H, W) in HU.

    Returns:
        (n, 2 * sum(WIDTHS)).
    """
    layers = list(_weights())
    at_once = max(1, PIXELS_AT_ONCE // planes[0].size)
    with _one_thread():
        rows = [
            _pooled(planes[start : start + at_once], layers)
            for start in range(0, len(planes), at_once)
        ]
    return torch.cat(rows).double().numpy()


def _pooled(planes: NDArray[Any], layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`features` of as many slices as are computed at a time."""
    values = np.asarray(planes, np.float32) / np.float32(SCALE_HU)
    x = torch.from_numpy(values)[:, None]
    pooled = []
    for kernel, bias in layers:
        x = functional.leaky_relu(functional.conv2d(x, kernel, bias, padding=1), LEAK)
        pooled += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        if min(x.shape[2:]) > 1:
            x = functional.avg_pool2d(x, 2)
    return torch.cat(pooled, 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small layers gain nothing from more threads, and their sums then depend on no count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def standardised(features_: NDArray[np.float64], real: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide features by their standard deviation over the real slices.

    Args:
        features_: (n, F).
        real: Features of the real slices, (m, F).

    Returns:
        (n, F).
    """
    deviation = real.std(0)
    least = max(LEAST_DEVIATION * float(deviation.max()), 1e-12)
    return features_ / np.maximum(deviation, least)


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Compute the Fréchet distance between two normal distributions with the sets' moments.

    |m_a - m_b|² + tr(A + B - 2 (A B)^½), as in FID (Heusel et al., NeurIPS 2017).

    Args:
        a: Features (n, F).
        b: Features (m, F).

    Returns:
        The squared distance, NaN for fewer than `LEAST_SLICES` slices.
    """
    if min(len(a), len(b)) < LEAST_SLICES:
        return float("nan")
    difference = a.mean(0) - b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of the root of A B is the sum of the roots of its eigenvalues, which are those of
    # the symmetric matrix A^½ B A^½.
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second @ root)
    trace = np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return float(difference @ difference + max(trace, 0.0))


def kernel_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Compute the unbiased squared MMD with the polynomial kernel of degree 3.

    Binkowski et al., "Demystifying MMD GANs", ICLR 2018. It has no bias in the number of slices and
    may be slightly negative.

    Args:
        a: Features (n, F).
        b: Features (m, F).

    Returns:
        The squared distance, NaN for fewer than `LEAST_SLICES` slices.
    """
    if min(len(a), len(b)) < LEAST_SLICES:
        return float("nan")
    centre = b.mean(0)
    x, y = a - centre, b - centre

    def kernel(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def mean_of_pairs(matrix: NDArray[np.float64]) -> float:
        count = len(matrix)
        return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))

    between = float(kernel(x, y).mean())
    return mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * between


def density_coverage(
    a: NDArray[np.float64], real: NDArray[np.float64], neighbours: int = 5
) -> dict[str, float]:
    """Compute precision, recall, density and coverage (Naeem et al., ICML 2020) by `prdc`.

    Args:
        a: Features of synthetic slices, (n, F).
        real: Features of real slices, (m, F).
        neighbours: The neighbour whose distance is a slice's radius.

    Returns:
        The four figures by name; NaN for too few slices.

    Raises:
        MissingComponent: The extra `metrics` is not installed.
    """
    from contextlib import redirect_stdout
    from io import StringIO

    from runtime.core.errors import importing

    with importing(
        "prdc", "prdc, which measures density and coverage", 'pip install -e ".[metrics]"'
    ):
        from prdc import compute_prdc
    if min(len(a), len(real)) < neighbours + 2:
        return dict.fromkeys(("precision", "recall", "density", "coverage"), float("nan"))
    # It prints, and the last line on stdout is ours.
    with redirect_stdout(StringIO()):
        figures = compute_prdc(real, a, neighbours)
    return {name: float(value) for name, value in figures.items()}
