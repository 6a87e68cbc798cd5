"""Plan a training config from a dataset, for those who have none."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import config as configs
from ..config import ORIGINAL_KEYS, DataConfig, RunConfig
from ..data.layouts import find
from .data_plan import Choices, plan_data
from .survey import survey

# The sections that no data decide: losses, augmentation and form of the networks.
BASE = Path(__file__).resolve().parent.parent / "configs" / "phantom.json"


@dataclass(frozen=True)
class Plan:
    """A planned config.

    Attributes:
        config: The config, with the overrides of the command line.
        reasons: Why a key has its value, by key.
        says: One line about the dataset.
    """

    config: RunConfig
    reasons: Mapping[str, str]
    says: str


def plan(path: str, overrides: Iterable[str], seconds: float) -> Plan:
    """Plan a config from the data and from the speed of this machine.

    Args:
        path: The dataset.
        overrides: Overrides as `key=value`, which the plan follows.
        seconds: The budget of the training.

    Returns:
        The plan.

    Raises:
        UsageError: The dataset has no known layout.
        InputError: A file cannot be read.
        ConfigError: An override is wrong, or contradicts the plan.
    """
    from ..loop import choose_device
    from .budget import plan_budget

    overrides = list(overrides)
    stated = _stated(overrides)
    base = configs.load(BASE)
    base["data"] = {"path": path}
    # What finds the data may be stated: names of files, the split by slices.
    data = _data_section(overrides, path)
    layout = find(Path(path), data)
    surveyed = survey(layout)
    cuda = choose_device(configs.resolve(base, _of("training.device", overrides)))[0].type == "cuda"
    choices = plan_data(surveyed, Path(path), stated, cuda=cuda)

    def resolve(more: Choices) -> RunConfig:
        tree = copy.deepcopy(base)
        for key, (value, _) in {**choices, **more}.items():
            _put(tree, key, value)
        return configs.resolve(tree, overrides, dataset_path=path)

    choices |= plan_budget(resolve, seconds, {*stated})
    reasons = {key: why for key, (_, why) in choices.items()}
    reasons |= dict.fromkeys(stated, "--set")
    return Plan(resolve({}), reasons, layout.says)


def _stated(overrides: Iterable[str]) -> dict[str, str]:
    """The overrides by this project's key."""
    stated = {}
    for override in overrides:
        key, _, value = override.partition("=")
        stated[ORIGINAL_KEYS[key][0] if key in ORIGINAL_KEYS else key] = value
    return stated


def _of(prefix: str, overrides: Iterable[str]) -> list[str]:
    """The overrides of one key or section."""
    return [override for override in overrides if override.startswith(prefix)]


def _data_section(overrides: Iterable[str], path: str) -> DataConfig:
    names = ("data.image_name", "data.label_name", "data.split_by", "data.train_ratio")
    original = ("TARGET_NAME", "INPUT_NAME")
    chosen = [item for name in (*names, *original) for item in _of(name, overrides)]
    return configs.resolve({}, chosen, dataset_path=path).data


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[name] = value
