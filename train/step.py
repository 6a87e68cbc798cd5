"""One optimisation of both networks: the discriminator, then the generator, then the generator's
running average.

Owns networks, optimisers and average; does no I/O and never waits for a device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runtime.core.errors import MissingComponent

from .config import RunConfig, label_table
from .distributed import SINGLE_PROCESS, DistributedContext
from .losses import (
    centre_weight,
    discriminator_losses,
    feature_matching,
    generator_losses,
    weighted_sum,
)
from .networks.discriminator import Discriminator
from .networks.generator import Generator, initialise, one_hot, standardise_noise


class Batch(NamedTuple):
    """`labels` (N, Z, H, W) model indices, any dtype, `image` float32 (N, 1, H, W) in [0, 1],
    `noise` uint8 (N, 1, H, W).

    `style` float32 (N, S), None for a generator that takes none.
    """

    labels: Tensor
    image: Tensor
    noise: Tensor
    style: Tensor | None = None


def make_generator(config: RunConfig) -> Generator:
    """The generator that `config` describes, channels_last, uninitialised beyond torch's
    defaults.
    """
    g = config.generator
    channels = len(label_table(config.data)) * config.data.slices
    net = Generator(
        channels,
        kind=g.kind,
        filters=g.filters,
        depth=g.depth,
        skips=g.skips,
        textures=g.textures,
        texture_kernel=g.texture_kernel,
        style=g.style,
    )
    net.to(memory_format=torch.channels_last)
    return net


def make_discriminator(config: RunConfig) -> Discriminator:
    """The discriminator that `config` describes, channels_last."""
    channels = len(label_table(config.data)) * config.data.slices
    net = Discriminator(channels, **asdict(config.discriminator))
    net.to(memory_format=torch.channels_last)
    return net


class Step:
    """The whole state of a training between two steps, and how it advances."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device | None = None,
        ranks: DistributedContext = SINGLE_PROCESS,
    ):
        self._config, self.device, self._ranks = config, device or torch.device("cpu"), ranks
        self.classes = len(label_table(config.data))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            self.generator, self.discriminator = make_generator(config), make_discriminator(config)
            initialise([self.generator, self.discriminator])
        self.generator.to(self.device)
        self.discriminator.to(self.device)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        betas = (config.optimizer.beta1, config.optimizer.beta2)
        self._adam_g = torch.optim.Adam(
            self.generator.parameters(), config.optimizer.lr_g, betas, fused=True
        )
        self._adam_d = torch.optim.Adam(
            self.discriminator.parameters(), config.optimizer.lr_d, betas, fused=True
        )
        self._generate, self._discriminate = (
            as_configured(f, config, self.device)
            for f in (self.generator.generate, self.discriminator)
        )

    def __call__(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Advance from `step` steps done to `step` + 1. Returns the losses by name, as scalars
        on the device.
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
        _backward_and_step(
            self._adam_d, self._ranks, weighted_sum(d_losses, dict.fromkeys(d_losses, 1.0))
        )

        self.discriminator.requires_grad_(False)
        # The discriminator sees the texture but does not shape it: free noise is the easy way to
        # look like bones and vessels.
        discriminator_input = fake_smooth + (fake - fake_smooth).detach()
        weight = centre_weight(labels) if loss.weighting == "weighted" else 1.0
        score, features = self._discriminate(condition, discriminator_input)
        g_losses = generator_losses(
            score.float(), fake_smooth, fake, real, gan=loss.gan, weight=weight
        )
        if loss.features:
            with torch.no_grad():
                wanted = self._discriminate(condition, real)[1]
            g_losses["features"] = feature_matching(
                [f.float() for f in features], [f.float() for f in wanted]
            )
        _backward_and_step(self._adam_g, self._ranks, weighted_sum(g_losses, asdict(loss)))

        update_average(
            self.average, self.generator, average_decay(step, self._config.training.ema_decay)
        )
        return {name: value.detach() for name, value in {**g_losses, **d_losses}.items()}

    def recalibrated(self, batches: Iterable[Batch]) -> Generator:
        """A copy of the average, in eval mode, whose batch statistics are the mean over
        `batches` (none: its own average).
        """
        net: Generator = copy.deepcopy(self.average)
        norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
        for count, batch in enumerate(batches):
            if count == 0:
                net.train()
                for layer in norms:
                    layer.reset_running_stats()
                    layer.momentum = None  # a plain mean over the batches
            with torch.no_grad():
                style = None if batch.style is None else batch.style.to(self.device)
                net(
                    one_hot(batch.labels.to(self.device), self.classes).contiguous(
                        memory_format=torch.channels_last
                    ),
                    style=style,
                )
        net.eval()
        return net

    def state(self) -> dict[str, Tensor]:
        """Every tensor that decides what the next steps do, by name; contiguous copies on the
        CPU.
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

        Raises KeyError or RuntimeError when a tensor is missing or misshapen.
        """
        for part, net in self._networks().items():
            net.load_state_dict({name: tensors[f"{part}/{name}"] for name in net.state_dict()})
        for part, (adam, net) in self._optimizers().items():
            for name, parameter in net.named_parameters():
                adam.state[parameter] = _adam_state(tensors, f"{part}/{name}/", parameter)

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "average": self.average,
        }

    def _optimizers(self) -> dict[str, tuple[torch.optim.Adam, nn.Module]]:
        return {
            "adam_g": (self._adam_g, self.generator),
            "adam_d": (self._adam_d, self.discriminator),
        }


def as_configured(
    network: Callable[..., Any], config: RunConfig, device: torch.device
) -> Callable[..., Any]:
    """`network` in the arithmetic of `training.precision`, compiled where `training.compile` says
    so.

    bf16 by autocast: weights, gradients, losses and everything that is averaged stay float32.
    """
    run = compiled(network) if config.training.compile else network

    def call(*arguments: Tensor | None) -> Any:
        with torch.autocast(
            device.type, torch.bfloat16, enabled=config.training.precision == "bf16"
        ):
            return run(*arguments)

    return call


def compiled(network: Callable[..., Any]) -> Callable[..., Any]:
    """`network` by torch.compile, when it is first called.

    Raises `MissingComponent` then, where that cannot work.
    """
    from torch._dynamo.exc import TorchDynamoException  # a second to import

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
    """The average's decay at `step`: lower at first, so that it forgets the random start."""
    return min(decay, (1 + step) / (10 + step))


def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average ← decay * average + (1 - decay) * network, for weights and batch statistics;
    counters are copied.
    """
    own, new = average.state_dict(), network.state_dict()
    floats = [name for name, t in own.items() if t.is_floating_point()]
    torch._foreach_lerp_([own[n] for n in floats], [new[n] for n in floats], 1 - decay)
    for name in own.keys() - set(floats):
        own[name].copy_(new[name])


def _adam_state(tensors: Mapping[str, Tensor], prefix: str, parameter: Tensor) -> dict[str, Any]:
    """Adam's state of one parameter, its moments laid out in memory as the parameter is: layout
    decides the last bit.
    """
    state: dict[str, Any] = {"step": tensors[prefix + "step"].to(parameter.device)}
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.empty_like(parameter, requires_grad=False).copy_(tensors[prefix + key])
    return state


def _set_rate(adam: torch.optim.Adam, rate: float) -> None:
    for group in adam.param_groups:
        group["lr"] = rate


def _backward_and_step(adam: torch.optim.Adam, ranks: DistributedContext, loss: Tensor) -> None:
    adam.zero_grad(set_to_none=True)
    loss.backward()
    ranks.average(parameter.grad for group in adam.param_groups for parameter in group["params"])
    adam.step()
