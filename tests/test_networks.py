"""Networks, losses and one optimisation step: shapes, values, formulas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from train import losses
from train.config import AugmentConfig, GeneratorConfig, LossConfig, load, resolve
from train.data.augmentation import apply, draw
from train.losses import (
    discriminator_losses,
    feature_matching,
    generator_losses,
    noise_floor,
    weighted_sum,
)
from train.networks.blocks import ARCHITECTURES, OutputHead, same_conv4
from train.networks.discriminator import Discriminator
from train.networks.generator import NOISE_MEAN, NOISE_SD, Generator, one_hot, standardise_noise
from train.step import Batch, Step, average_decay, update_average

SMALL = [
    "data.canvas=[32,32]",
    "generator.depth=3",
    "generator.filters=8",
    "discriminator.filters=8",
    "generator.kind=unet",
    "generator.skips=true",
    "generator.textures=3",
    "loss.texture=10",
    "training.batch_size=2",
    "discriminator.patch_size=8",
]


# What a step reports; `features` only where its weight is not 0.
LOGGED = {*losses.generator_weights(LossConfig()), "d_real", "d_fake"}


def small(*more: str) -> Step:
    return Step(resolve({}, [*SMALL, *more]))


def batch(seed: int = 0, n: int = 2) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        torch.from_numpy(rng.integers(0, 8, (n, 1, 32, 32), np.uint8)),
        torch.from_numpy(rng.random((n, 1, 32, 32), np.float32)),
        torch.from_numpy(rng.integers(0, 256, (n, 1, 32, 32), np.uint8)),
    )


def test_reference_generator_equals_original() -> None:
    net = Generator(8, kind="reference", filters=64, depth=7, skips=False)
    kernels = [
        tuple(m.weight.shape)
        for m in net.modules()
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))
    ]
    down = [(64, 8), (128, 64), (256, 128), (512, 256), (512, 512), (512, 512), (512, 512)]
    up = [((512, 512), (512, 512))] * 3 + [
        ((512, 256), (256, 256)),
        ((256, 128), (128, 128)),
        ((128, 64), (64, 64)),
    ]
    expected = [*down, *(shape for pair in up for shape in pair), (64, 1), (1, 1)]
    assert kernels == [(*shape, 4, 4) for shape in expected]
    assert sum(p.numel() for p in net.parameters()) == 44_652_114
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == [
        0.2
    ] * 12  # 6 down (not the first), 6 up


@pytest.mark.parametrize("slices", [1, 3, 5])
def test_edge_generator_cost(slices: int) -> None:
    """The edge generator needs a twelfth of the work of the reference.

    At 256 x 256, as its config ships it, with texture and a style; the reference as the original
    has it.
    """
    edge = GeneratorConfig(**load(Path("train/configs/edge.json"))["generator"])
    nets = [
        Generator(8 * slices, kind="reference", filters=64, depth=7, skips=False),
        Generator(
            8 * slices,
            **{
                k: v
                for k, v in vars(edge).items()
                if not k.startswith(("activation", "style", "noise"))
            },
            style=4,
        ),
    ]
    work = []
    for net in nets:
        inputs = (
            torch.zeros(1, 8 * slices, 256, 256),
            torch.zeros(1, 1, 256, 256),
            torch.zeros(1, 4),
        )
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net.eval()(*inputs)
        work.append(counter.get_total_flops())
    assert work[0] / work[1] >= 12


def test_skips_double_decoder_inputs() -> None:
    net = Generator(8, kind="reference", filters=4, depth=3, skips=True)
    assert [
        tuple(m.weight.shape)[:2] for m in net.modules() if isinstance(m, nn.ConvTranspose2d)
    ] == [(16, 8), (16, 4), (8, 1)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("skips", [True, False])
def test_generator_sizes_multiples_of_divisor(kind: str, skips: bool) -> None:
    """The generator synthesizes any size that is a multiple of its divisor."""
    net = Generator(8, kind=kind, filters=8, depth=3, skips=skips, textures=2).eval()
    assert net.divisor == 8 and net.noisy
    for h, w in ((8, 8), (24, 40)):
        _, image = net(torch.rand(2, 8, h, w), torch.randn(2, 1, h, w))
        assert image.shape == (2, 1, h, w) and image.min() >= 0 and image.max() <= 1
    _, without_noise = net(torch.zeros(1, 8, 8, 8))
    _, noise_of_zero = net(torch.zeros(1, 8, 8, 8), torch.zeros(1, 1, 8, 8))
    assert torch.equal(without_noise, noise_of_zero)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_texture_linear_in_noise(kind: str) -> None:
    torch.manual_seed(0)
    net = (
        Generator(8, kind=kind, filters=8, depth=3, skips=True, textures=4, texture_kernel=5)
        .double()
        .eval()
    )
    condition, a, b = (
        torch.rand(1, 8, 16, 16).double(),
        torch.randn(1, 1, 16, 16).double(),
        torch.randn(1, 1, 16, 16).double(),
    )

    def logit(noise: torch.Tensor) -> torch.Tensor:
        return torch.logit(net(condition, noise)[1])

    base = logit(torch.zeros_like(a))
    torch.testing.assert_close(
        logit(2 * a - 3 * b) - base, 2 * (logit(a) - base) - 3 * (logit(b) - base)
    )
    assert (logit(a) - base).abs().max() > 0


def test_one_hot_channel_order() -> None:
    """One-hot encoding orders its channels by slice, then by class."""
    labels = torch.tensor([[[[0, 2]], [[1, 1]]]], dtype=torch.uint8)  # Z = 2, H = 1, W = 2
    expected = torch.tensor(
        [[[[1, 0]], [[0, 0]], [[0, 1]], [[0, 0]], [[1, 1]], [[0, 0]]]], dtype=torch.float32
    )
    for values in (labels, labels.float()):
        assert torch.equal(one_hot(values, 3), expected)
    random = torch.randint(0, 8, (3, 1, 5, 7))
    assert torch.equal(
        one_hot(random, 8).long(), nn.functional.one_hot(random[:, 0], 8).permute(0, 3, 1, 2)
    )
    for slices in (1, 3):  # as convolutions read it
        assert one_hot(random.expand(-1, slices, -1, -1), 8).is_contiguous(
            memory_format=torch.channels_last
        )


def test_noise_bytes_are_standardized() -> None:
    """Noise bytes get mean zero and unit variance."""
    values = standardise_noise(torch.arange(256, dtype=torch.uint8)).numpy()
    assert abs(values.mean()) < 1e-6 and abs(values.std() - 1) < 1e-3
    assert (NOISE_MEAN, NOISE_SD) == (127.5, 73.9)


def test_same_padding_one_before_two_after() -> None:
    layer = same_conv4(1, 1)
    nn.init.zeros_(layer[1].weight)
    nn.init.zeros_(layer[1].bias)
    layer[1].weight.data[0, 0, 1, 1] = 1  # the kernel's second tap meets the pixel itself
    image = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert torch.equal(layer(image), image)


@pytest.mark.parametrize(("conditional", "inputs"), [(True, 9), (False, 1)])
def test_the_discriminator_scores_patches(conditional: bool, inputs: int) -> None:
    net = Discriminator(8, filters=64, patch_size=16, conditional=conditional)
    kernels = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [
        (64, inputs, 4, 4),
        (128, 64, 4, 4),
        (256, 128, 4, 4),
        (512, 256, 4, 4),
        (1, 512, 4, 4),
    ]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 3
    score, features = net(torch.zeros(2, 8, 64, 32), torch.zeros(2, 1, 64, 32))
    assert score.shape == (2, 1, 4, 2)
    assert [tuple(f.shape) for f in features] == [
        (2, 64, 32, 16),
        (2, 128, 16, 8),
        (2, 256, 8, 4),
        (2, 512, 4, 2),
    ]


def test_discriminator_first_convolution() -> None:
    """The first convolution is one over the image and the labels together."""
    torch.manual_seed(0)
    net = Discriminator(3, filters=4, patch_size=8).double().eval()
    condition, image = (
        torch.rand(2, 3, 32, 32, dtype=torch.float64),
        torch.rand(2, 1, 32, 32, dtype=torch.float64),
    )
    x = torch.cat([image, condition], 1)
    for stage in net.stages:
        x = stage(x)
    torch.testing.assert_close(net(condition, image)[0], net.score(x))


def test_losses_against_hand_computed_values() -> None:
    real, fake = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.2])
    d = discriminator_losses(real, fake)
    assert d["d_real"].item() == pytest.approx(0.5 * (0 + 0.25) / 2) and d[
        "d_fake"
    ].item() == pytest.approx(0.5 * (0 + 0.04) / 2)
    smooth, truth = torch.full((1, 1, 8, 8), 0.25), torch.full((1, 1, 8, 8), 0.75)
    g = generator_losses(fake, smooth, smooth, truth)
    assert g["adversarial"].item() == pytest.approx((1 + 0.64) / 2)
    assert g["reconstruction"].item() == pytest.approx(0.5)
    assert g["texture"].item() == pytest.approx(0)  # both flat
    assert (
        weighted_sum(
            {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, {"a": 10, "b": 1, "c": 5}
        ).item()
        == 23
    )


def test_losses_without_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real_losses = losses.generator_losses

    def with_another(*images: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        return {**real_losses(*images, **options), "sharpness": images[0].mean()}

    weights = {"adversarial": 1, "reconstruction": 100, "texture": 3, "features": 0}
    assert weights.items() <= losses.generator_weights(LossConfig(texture=3)).items()
    monkeypatch.setattr(losses, "generator_losses", with_another)
    with pytest.raises(TypeError, match="'sharpness' needs a weight of that name in LossConfig"):
        small()


def test_config_names_every_architecture() -> None:
    assert set(get_args(get_type_hints(GeneratorConfig)["kind"])) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("textures", [0, 3])
def test_heads_keep_the_output_contract(kind: str, textures: int) -> None:
    channels, width, (h, w) = 5, 6, (16, 24)
    head = ARCHITECTURES[kind].head(width, channels, 8, textures, 4)
    assert isinstance(head, OutputHead)
    parts = [torch.rand(2, width - 2, h // 2, w // 2), torch.rand(2, 2, h // 2, w // 2)]
    base, amplitudes = head(parts, torch.rand(2, channels, h, w), torch.rand(2, 4))
    block = head.block
    assert base.shape == (2, block**2, h // block, w // block)
    if textures:
        assert amplitudes.shape == (2, textures * block**2, h // block, w // block)
    else:
        assert amplitudes is None and head.amplitudes is None


def test_hinge_losses_hand_computed() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    d = discriminator_losses(real, fake, "hinge")
    assert d["d_real"].item() == pytest.approx(0.5 * (0 + 0.5) / 2) and d[
        "d_fake"
    ].item() == pytest.approx(0.5 * (0 + 1.5) / 2)
    image = torch.zeros(1, 1, 8, 8)
    assert generator_losses(fake, image, image, image, gan="hinge")[
        "adversarial"
    ].item() == pytest.approx(2.5 / 2)


def test_feature_matching_loss() -> None:
    """Feature matching weighs every stage alike and moves the generator only."""
    fake = [
        torch.tensor([1.0, 3.0], requires_grad=True),
        torch.tensor([0.0] * 8, requires_grad=True),
    ]
    real = [torch.tensor([0.0, 0.0], requires_grad=True), torch.tensor([6.0] * 8)]
    value = feature_matching(fake, real)
    assert value.item() == (2 + 6) / 2
    value.backward()
    assert (
        real[0].grad is None
        and fake[0].grad is not None
        and torch.equal(fake[0].grad, torch.tensor([0.25, 0.25]))
    )


def test_active_losses_logged_and_trained() -> None:
    """Each loss with a weight is logged by its name and moves the generator."""
    plain, matched = small(), small("loss.features=10", "loss.gan=hinge")
    assert set(plain(0, batch())) == LOGGED - {"features"}
    losses = matched(0, batch())
    assert set(losses) == LOGGED and losses["features"] > 0
    assert not torch.equal(
        plain.state()["generator/top.image.weight"], matched.state()["generator/top.image.weight"]
    )


def test_noise_floor_ignores_edges() -> None:
    """The noise floor measures grain, not edges."""
    step = torch.zeros(1, 1, 64, 64)
    step[..., 31:] = 1
    assert noise_floor(step, 3).max() < 0.003
    grain = noise_floor(
        step + 0.1 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)), 3
    )
    assert 0.03 < grain.mean() < 0.1


def test_weight_average_formula() -> None:
    """The average of the weights follows its formula and includes the batch statistics."""
    a, b = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    b.weight.data.fill_(3)
    b.running_mean.fill_(10)
    b.num_batches_tracked.fill_(7)
    update_average(a, b, 0.9)
    assert torch.allclose(a.weight, torch.full((2,), 0.9 * 1 + 0.1 * 3)) and torch.allclose(
        a.running_mean, torch.full((2,), 1.0)
    )
    assert a.num_batches_tracked == 7
    assert [average_decay(n, 0.99) for n in (0, 90, 10_000)] == [0.1, 0.91, 0.99]


def test_step_updates_networks_and_average() -> None:
    step = small()
    before = copy.deepcopy(step.state())
    losses = step(0, batch())
    assert set(losses) == LOGGED - {"features"}
    after = step.state()
    for part in (
        "generator/top.image.weight",
        "generator/texture.filters.weight",
        "discriminator/score.1.weight",
        "average/top.image.weight",
    ):
        assert not torch.equal(before[part], after[part]), part
    expected = (
        0.1 * before["generator/top.image.weight"] + 0.9 * after["generator/top.image.weight"]
    )
    torch.testing.assert_close(after["average/top.image.weight"], expected)


def test_discriminator_leaves_texture_alone() -> None:
    """With no weight on the texture loss nothing moves the noise filters: adversarial gradients
    reach anatomy only.
    """
    step = small("loss.texture=0")
    before = step.state()["generator/texture.filters.weight"]
    step(0, batch())
    assert torch.equal(step.state()["generator/texture.filters.weight"], before)


def test_learning_rate_decays_exponentially() -> None:
    step = small("optimizer.lr_g=0.1", "optimizer.decay_g=0.5", "optimizer.lr_d=0.2")
    step(4, batch())
    assert (
        step._adam_g.param_groups[0]["lr"] == pytest.approx(0.1 * np.exp(-2))
        and step._adam_d.param_groups[0]["lr"] == 0.2
    )


def test_training_state_round_trip() -> None:
    """After the state is loaded, the next step has the same bits."""
    a, b = small(), small("training.seed=5")
    a(0, batch(0))
    b(0, batch(2))
    b.load_state(a.state())
    for step in (a, b):
        step(1, batch(1))
    left, right = a.state(), b.state()
    assert left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def test_augmentation_moves_labels_with_image() -> None:
    image = torch.zeros(1, 1, 32, 48)
    image[..., 8:20, 10:30] = 1
    labels = (image * 3).to(torch.uint8)
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    for given, moved in zip((labels, image), apply(identity, labels, image), strict=True):
        torch.testing.assert_close(moved, given.float(), atol=1e-5, rtol=0)
    shift = torch.tensor(
        [[[1.0, 0, 2 * 4 / 48], [0, 1, 2 * -3 / 32]]]
    )  # the output's pixel shows what lies 4 to the right, 3 above
    moved_labels, moved_image = apply(shift, labels, image)
    assert (
        torch.equal(moved_labels[..., 11:23, 6:26], torch.full((1, 1, 12, 20), 3.0))
        and moved_labels.sum() == labels.sum()
    )
    torch.testing.assert_close(moved_image * 3, moved_labels, atol=1e-3, rtol=0)
    quarter = torch.tensor(
        [[[0.0, -1, 0], [1, 0, 0]]]
    )  # a rotation keeps its shape where H and W differ
    assert apply(quarter, labels, image)[0].sum() == labels.sum()


def test_augmentation_ranges_and_texture() -> None:
    """Augmentation draws within its ranges and keeps the texture."""
    settings = AugmentConfig(rotation=10, zoom=0.1, shift_width=0.1, shift_height=0.05)
    maps = draw(settings, 200, np.random.default_rng(0))
    assert maps.shape == (200, 2, 3) and maps.dtype == np.float32
    angles = np.degrees(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert (
        9 < np.abs(angles).max() <= 10
        and 0.19 < np.abs(maps[:, 0, 2]).max() <= 0.2
        and 0.09 < np.abs(maps[:, 1, 2]).max() <= 0.1
    )
    scale = np.linalg.norm(maps[:, :, 0], axis=1)
    assert scale.min() >= 1 / 1.1 - 1e-6 and scale.max() <= 1 / 0.9 + 1e-6
    assert np.allclose(draw(AugmentConfig(), 2, np.random.default_rng(0)), np.eye(2, 3))
    grain = 0.5 + 0.05 * torch.randn(200, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = apply(torch.from_numpy(maps), torch.zeros(200, 1, 32, 32), grain)[1][..., 12:20, 12:20]
    assert moved.std() > 0.04


def test_recalibration_of_batch_statistics() -> None:
    """Recalibration measures the batch statistics of the averaged weights."""
    step = small()
    for n in range(3):
        step(n, batch(n))
    batches = [batch(10), batch(11)]
    net = step.recalibrated(batches)
    first, last = net.encoder[0], net.encoder[1][0]
    means = [last(first(one_hot(b.labels, 8))).mean((0, 2, 3)) for b in batches]
    torch.testing.assert_close(
        net.encoder[1][1].running_mean, (means[0] + means[1]) / 2, rtol=1e-4, atol=1e-5
    )
    assert not net.training and torch.equal(
        net.top.image.weight, step.ema_generator.top.image.weight
    )
    untouched = step.recalibrated([])
    assert torch.equal(
        untouched.encoder[1][1].running_mean, step.ema_generator.encoder[1][1].running_mean
    )
