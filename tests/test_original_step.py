"""The original's networks and losses, written out once more as formulas: our step has their
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from train.config import load, resolve
from train.step import Batch, Step

WHS = Path(__file__).parent / "whs_original.json"
CLASSES = 8


def batch() -> Batch:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, CLASSES, (4, 1, 64, 64), np.uint8))
    return Batch(
        labels, torch.from_numpy(rng.random((4, 1, 64, 64), np.float32)), torch.zeros(4, 1, 64, 64)
    )


def step_of(*more: str) -> Step:
    small = [
        "IMAGE_RES=[64,64]",
        "generator.depth=5",
        "FIRST_LAYERS_FILTERS=4",
        "discriminator.filters=4",
        "training.threads=1",
    ]
    return Step(resolve(load(WHS), [*small, *more]))


def layers(net: nn.Module, *kinds: type[nn.Module]) -> Iterator[list[Tensor | None]]:
    """[weight, bias] of the layers of these kinds, in the order of the network, to be
    differentiated.
    """
    for layer in net.modules():
        if isinstance(layer, kinds):
            yield [
                None if t is None else t.detach().clone().requires_grad_()
                for t in (layer.weight, layer.bias)
            ]


class Layers:
    """A network's convolutions and norms, to be called one after the other."""

    def __init__(self, net: nn.Module):
        self.convs, self.norms = (
            [*layers(net, nn.Conv2d, nn.ConvTranspose2d)],
            [*layers(net, nn.BatchNorm2d)],
        )
        self._convs, self._norms = iter(self.convs), iter(self.norms)

    def down(self, x: Tensor) -> Tensor:
        return f.conv2d(x, *next(self._convs), stride=2, padding=1)

    def up(self, x: Tensor) -> Tensor:
        return f.conv_transpose2d(x, *next(self._convs), stride=2, padding=1)

    def same(self, x: Tensor) -> Tensor:
        return f.conv2d(f.pad(x, (1, 2, 1, 2)), *next(self._convs))

    def norm(self, x: Tensor) -> Tensor:
        return f.batch_norm(x, None, None, *next(self._norms), training=True)


def generate(net: Layers, condition: Tensor, depth: int, skips: bool) -> Tensor:
    x = f.leaky_relu(net.down(condition), 0.2)
    kept = [x]
    for _ in range(depth - 1):
        kept.append(x := f.leaky_relu(net.norm(net.down(x)), 0.2))
    for skip in reversed(kept[:-1]):
        x = net.norm(f.relu(net.same(net.up(x))))
        x = torch.cat([x, skip], 1) if skips else x
    return torch.sigmoid(net.same(net.up(x)))


def discriminate(net: Layers, image: Tensor, condition: Tensor | None, patch_size: int) -> Tensor:
    x = f.leaky_relu(
        net.down(image if condition is None else torch.cat([image, condition], 1)), 0.2
    )
    for _ in range(int(math.log2(patch_size)) - 1):
        x = f.leaky_relu(net.norm(net.down(x)), 0.2)
    return net.same(x)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(("conditional", "patch_size"), [(True, 16), (False, 8)])
@pytest.mark.parametrize("weights", [(1, 100), (3, 7)])
def test_step_descends_original_losses(
    skips: bool, conditional: bool, patch_size: int, weights: tuple[int, int]
) -> None:
    """A step descends the losses of the original system through its networks.

    Of the generator LOSS_WEIGHT_DISC * LSGAN + LOSS_WEIGHT_GEN * MAE, of the discriminator the mean
    of its two squared errors.
    """
    step = step_of(
        f"SKIP_CONNECTIONS_GENERATOR={str(skips).lower()}",
        f"CONDITIONAL_DISCRIMINATOR={str(conditional).lower()}",
        f"PATCH_SIZE={patch_size}",
        f"LOSS_WEIGHT_DISC={weights[0]}",
        f"LOSS_WEIGHT_GEN={weights[1]}",
    )
    given = batch()
    one_hot = f.one_hot(given.labels[:, 0].long(), CLASSES).permute(0, 3, 1, 2).float()
    condition = one_hot if conditional else None

    generator, before = Layers(step.generator), [Layers(step.discriminator) for _ in range(2)]
    generated = generate(generator, one_hot, 5, skips)
    on_real, on_generated = (
        discriminate(before[0], given.image, condition, patch_size),
        discriminate(before[1], generated.detach(), condition, patch_size),
    )
    (0.5 * ((on_real - 1) ** 2).mean() + 0.5 * (on_generated**2).mean()).backward()
    losses = step(0, given)
    after = Layers(step.discriminator)
    fooled, away = (
        ((discriminate(after, generated, condition, patch_size) - 1) ** 2).mean(),
        (generated - given.image).abs().mean(),
    )
    (weights[0] * fooled + weights[1] * away).backward()

    assert losses["adversarial"].item() == pytest.approx(fooled.item(), rel=1e-4)
    assert losses["reconstruction"].item() == pytest.approx(away.item(), rel=1e-4)
    assert_same_gradients(step.generator, [generator])
    assert_same_gradients(step.discriminator, before)


def assert_same_gradients(net: nn.Module, written_out: list[Layers]) -> None:
    expected = [
        sum(t.grad for t in tensors)
        for kind in ("convs", "norms")
        for layer in zip(*(getattr(w, kind) for w in written_out), strict=True)
        for tensors in zip(*layer, strict=True)
        if tensors[0] is not None
    ]
    modules = [
        m
        for kinds in ((nn.Conv2d, nn.ConvTranspose2d), (nn.BatchNorm2d,))
        for m in net.modules()
        if isinstance(m, kinds)
    ]
    found = [t.grad for m in modules for t in (m.weight, m.bias) if t is not None]
    assert len(found) == len(expected) > 8
    largest = max(g.abs().max() for g in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=float(1e-5 * largest))


def test_adam_and_original_learning_rates() -> None:
    """lr0 * exp(-f * iteration), each network's own; the first moment's decay is ADAM_B1."""
    step = step_of(
        "LEARNING_RATE_G=0.1",
        "LEARNING_RATE_D=0.2",
        "LR_EXP_DECAY_FACTOR_G=0.5",
        "LR_EXP_DECAY_FACTOR_D=0.25",
        "ADAM_B1=0.4",
    )
    step(4, batch())
    for adam, rate in ((step._adam_g, 0.1 * math.exp(-2)), (step._adam_d, 0.2 * math.exp(-1))):
        (group,) = adam.param_groups
        assert (
            type(adam) is torch.optim.Adam
            and group["lr"] == pytest.approx(rate)
            and group["betas"] == (0.4, 0.999)
        )
