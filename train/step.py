"""One step of a training: the discriminator, then the generator, then the generator's EMA.

`Step` owns the networks, the optimisers and the exponential moving average (EMA) of the
generator's weights. It does no I/O and never waits for a device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runtime.core.errors import MissingComponent

from .config import RunConfig, class_count, label_table
from .data.class_statistics import ClassStatistics
from .distributed import SINGLE_PROCESS, DistributedContext
from .losses import (
    FEATURES,
    centre_weight,
    discriminator_losses,
    feature_matching,
    generator_losses,
    generator_weights,
    weighted_sum,
)
from .networks.discriminator import Discriminator
from .networks.generator import Generator, initialise, one_hot, standardise_noise


class Batch(NamedTuple):
    """One batch of training slices.

    Attributes:
        labels: (N, Z, H, W) model indices, any dtype.
        image: float32 (N, 1, H, W) in [0, 1].
        noise: uint8 (N, 1, H, W), uniform bytes.
        style: float32 (N, S), or None for a generator that takes no style.
    """

    labels: Tensor
    image: Tensor
    noise: Tensor
    style: Tensor | None = None


def make_generator(config: RunConfig) -> Generator:
    """Build the generator of a config, in channels_last, with torch's default initialisation.

    Args:
        config: The config of the run.

    Returns:
        The generator on the CPU.
    """
    g = config.generator
    channels = class_count(config.data) * config.data.slices
    net = Generator(
        channels,
        kind=g.kind,
        filters=g.filters,
        depth=g.depth,
        skips=g.skips,
        textures=g.textures,
        texture_kernel=g.texture_kernel,
        style=g.style,
        mean_skip=config.data.context == "auto",
        slices=config.data.slices,
    )
    net.to(memory_format=torch.channels_last)
    return net


def make_discriminator(config: RunConfig) -> Discriminator:
    """Build the discriminator of a config, in channels_last.

    Args:
        config: The config of the run.

    Returns:
        The discriminator on the CPU.
    """
    channels = class_count(config.data) * config.data.slices
    net = Discriminator(channels, **asdict(config.discriminator))
    net.to(memory_format=torch.channels_last)
    return net


class Step:
    """The whole state of a training between two steps, and how it advances.

    Attributes:
        generator: The network that is trained.
        discriminator: Its opponent.
        ema_generator: The running average of the generator's weights, in eval mode.
        classes: The number of classes that the network sees.
        device: Where all of them lie.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device | None = None,
        ranks: DistributedContext = SINGLE_PROCESS,
        statistics: ClassStatistics | None = None,
    ):
        self._config, self.device, self._ranks = config, device or torch.device("cpu"), ranks
        self._loss_weights = generator_weights(config.loss)
        self.classes, self._labels = class_count(config.data), len(label_table(config.data))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            self.generator, self.discriminator = make_generator(config), make_discriminator(config)
            initialise([self.generator, self.discriminator])
        if self.generator.mean_skip is not None and statistics is not None:
            means, medians, texture = map(torch.from_numpy, statistics.shares())
            self.generator.mean_skip.start(means, medians, texture, statistics.spread)
            if self.generator.noisy:
                self.generator.texture.start(statistics.grain)
        self.generator.to(self.device)
        self.discriminator.to(self.device)
        self.ema_generator = copy.deepcopy(self.generator).eval().requires_grad_(False)
        betas = (config.optimizer.beta1, config.optimizer.beta2)
        self._adam_g = torch.optim.Adam(
            self.generator.parameters(), config.optimizer.lr_g, betas, fused=True
        )
        self._adam_d = torch.optim.Adam(
            self.discriminator.parameters(), config.optimizer.lr_d, betas, fused=True
        )

    @cached_property
    def _generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The generator as trained. Made at the first step, where all ranks meet."""
        network = self._ranks.data_parallel(self.generator)
        return as_configured(network, self._config, self.device)

    @cached_property
    def _discriminate(self) -> Callable[..., tuple[Tensor, list[Tensor]]]:
        """The discriminator as trained. Made at the first step, where all ranks meet."""
        network = self._ranks.data_parallel(self.discriminator)
        return as_configured(network, self._config, self.device)

    @cached_property
    def _discriminate_frozen(self) -> Callable[..., tuple[Tensor, list[Tensor]]]:
        """The discriminator in the generator's turn: no gradient of its own to average."""
        return as_configured(self.discriminator, self._config, self.device)

    def __call__(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Advance by one step.

        Args:
            step: The number of steps done so far.
            batch: The batch of this step.

        Returns:
            The losses by name, as scalars on the device.
        """
        o, loss = self._config.optimizer, self._config.loss
        _set_rate(self._adam_g, o.lr_g * math.exp(-o.decay_g * step))
        _set_rate(self._adam_d, o.lr_d * math.exp(-o.decay_d * step))
        labels, real, noise, style = (
            t if t is None else t.to(self.device, non_blocking=True) for t in batch
        )
        condition = one_hot(labels, self.classes).contiguous(memory_format=torch.channels_last)
        unit_noise = standardise_noise(noise) if self.generator.noisy else None
        fake_smooth, fake = (
            image.float() for image in self._generate(condition, unit_noise, style)
        )

        self.discriminator.requires_grad_(True)
        score_real, score_fake = (
            self._discriminate(condition, image)[0].float() for image in (real, fake.detach())
        )
        d_losses = discriminator_losses(score_real, score_fake, loss.gan)
        d_loss = weighted_sum(d_losses, dict.fromkeys(d_losses, 1.0))
        _backward_and_step(self._adam_d, d_loss)

        self.discriminator.requires_grad_(False)
        # The discriminator sees the texture but does not train it: noise without any other
        # constraint would imitate bones and vessels.
        discriminator_input = fake_smooth + (fake - fake_smooth).detach()
        weight: Tensor | float = 1.0
        if loss.weighting == "weighted":
            # The mask is what experts labelled; context classes are not.
            weight = centre_weight(torch.where(batch.labels < self._labels, batch.labels, 0))
            weight = weight.to(self.device)
        score, features = self._discriminate_frozen(condition, discriminator_input)
        g_losses = generator_losses(
            score.float(), fake_smooth, fake, real, gan=loss.gan, weight=weight
        )
        if loss.features:
            with torch.no_grad():
                real_features = self._discriminate_frozen(condition, real)[1]
            g_losses[FEATURES] = feature_matching(
                [f.float() for f in features], [f.float() for f in real_features]
            )
        g_loss = weighted_sum(g_losses, self._loss_weights)
        _backward_and_step(self._adam_g, g_loss)

        decay = average_decay(step, self._config.training.ema_decay)
        update_average(self.ema_generator, self.generator, decay)
        return {name: value.detach() for name, value in {**g_losses, **d_losses}.items()}

    def recalibrated(self, batches: Iterable[Batch]) -> Generator:
        """Copy the EMA generator and measure its batch statistics anew.

        Args:
            batches: The batches over which the statistics are averaged; none: they stay as they
                are.

        Returns:
            The copy, in eval mode.
        """
        net: Generator = copy.deepcopy(self.ema_generator)
        norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
        for count, batch in enumerate(batches):
            if count == 0:
                net.train()
                for layer in norms:
                    layer.reset_running_stats()
                    # None makes a plain mean over the batches.
                    layer.momentum = None
            with torch.no_grad():
                style = None if batch.style is None else batch.style.to(self.device)
                condition = one_hot(batch.labels.to(self.device), self.classes)
                net(condition.contiguous(memory_format=torch.channels_last), style=style)
        net.eval()
        return net

    def state(self) -> dict[str, Tensor]:
        """Collect every tensor that decides what the next steps do.

        Returns:
            Contiguous copies on the CPU, by name.
        """
        tensors = {
            f"{part}/{name}": t
            for part, net in self._networks().items()
            for name, t in net.state_dict().items()
        }
        for part, (adam, net) in self._optimizers().items():
            for name, parameter in net.named_parameters():
                tensors.update(
                    {f"{part}/{name}/{key}": value for key, value in adam.state[parameter].items()}
                )
        return {
            name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, t in tensors.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned.

        Args:
            tensors: The tensors by name.

        Raises:
            KeyError: A tensor is missing.
            RuntimeError: A tensor has another shape.
        """
        for part, net in self._networks().items():
            net.load_state_dict({name: tensors[f"{part}/{name}"] for name in net.state_dict()})
        for part, (adam, net) in self._optimizers().items():
            for name, parameter in net.named_parameters():
                adam.state[parameter] = _adam_state(tensors, f"{part}/{name}/", parameter)

    def _networks(self) -> dict[str, nn.Module]:
        """The networks by the part of a checkpoint that they are."""
        # The keys begin the names of tensors in users' checkpoints: do not change them.
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "average": self.ema_generator,
        }

    def _optimizers(self) -> dict[str, tuple[torch.optim.Adam, nn.Module]]:
        """The optimisers with their networks, by the part of a checkpoint that they are."""
        return {
            "adam_g": (self._adam_g, self.generator),
            "adam_d": (self._adam_d, self.discriminator),
        }


def as_configured(
    network: Callable[..., Any], config: RunConfig, device: torch.device
) -> Callable[..., Any]:
    """Let a network compute in the precision of the config, compiled where the config says so.

    bf16 uses autocast: weights, gradients, losses and all averages stay float32.

    Args:
        network: The network, or one of its methods.
        config: The config of the run.
        device: Where the network lies.

    Returns:
        A function with the same arguments and result.
    """
    run = compiled(network) if config.training.compile else network

    def call(*arguments: Tensor | None) -> Any:
        with torch.autocast(
            device.type, torch.bfloat16, enabled=config.training.precision == "bf16"
        ):
            return run(*arguments)

    return call


def compiled(network: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a network by torch.compile at its first call.

    Args:
        network: The network, or one of its methods.

    Returns:
        A function with the same arguments and result. It raises `MissingComponent` where
        torch.compile cannot work.
    """
    # This import takes a second, so only compiled runs pay for it.
    from torch._dynamo.exc import TorchDynamoException

    run = torch.compile(network, dynamic=False)

    def call(*arguments: Tensor | None) -> Any:
        try:
            return run(*arguments)
        except TorchDynamoException as exc:
            lines = str(exc).strip().splitlines() or [type(exc).__name__]
            raise MissingComponent(
                f"torch.compile cannot be used here: {lines[0][:200]}",
                expected="a C++ compiler (CPU) or Triton (GPU)",
                remedy="install one, or set training.compile=false",
            ) from exc

    return call


def average_decay(step: int, decay: float) -> float:
    """Lower the EMA's decay in the first steps, so that it forgets the random start.

    Args:
        step: The number of steps done.
        decay: The decay in the long run.

    Returns:
        The decay at this step.
    """
    return min(decay, (1 + step) / (10 + step))


def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Update average ← decay * average + (1 - decay) * network.

    Weights and batch statistics are averaged; counters are copied.

    Args:
        average: The averaged network, changed in place.
        network: The trained network.
        decay: The share of the old average, in [0, 1].
    """
    averaged, current = average.state_dict(), network.state_dict()
    floats = [name for name, t in averaged.items() if t.is_floating_point()]
    torch._foreach_lerp_([averaged[n] for n in floats], [current[n] for n in floats], 1 - decay)
    for name in averaged.keys() - set(floats):
        averaged[name].copy_(current[name])


def _adam_state(tensors: Mapping[str, Tensor], prefix: str, parameter: Tensor) -> dict[str, Any]:
    """Rebuild Adam's state of one parameter, with its moments in the parameter's memory layout.

    The layout decides the last bit of the next step.
    """
    state: dict[str, Any] = {"step": tensors[prefix + "step"].to(parameter.device)}
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.empty_like(parameter, requires_grad=False).copy_(tensors[prefix + key])
    return state


def _set_rate(adam: torch.optim.Adam, rate: float) -> None:
    """Set the learning rate of an optimiser."""
    for group in adam.param_groups:
        group["lr"] = rate


def _backward_and_step(adam: torch.optim.Adam, loss: Tensor) -> None:
    """Compute the gradients of `loss`, averaged over the ranks, and let `adam` step."""
    adam.zero_grad(set_to_none=True)
    loss.backward()
    adam.step()
