"""Infer from the data what a config leaves open: labels and modality null, and intensity "auto".

This happens before a run folder is claimed, and the command line prints the choices.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.core.errors import ConfigError

from ..config import IntensityConfig, RunConfig, label_table
from .checks import AIR_HU, read_image
from .layouts import Layout, find

# From air to dense bone and contrast: the range of train/configs/whs.json.
HU = IntensityConfig("HU", -1024, 1976)


def infer_from_data(config: RunConfig) -> tuple[RunConfig, str]:
    """Fill in what the config leaves open.

    Only `data.path` is read.

    Args:
        config: The config.

    Returns:
        The config with nothing open, and a line about the data for a person.

    Raises:
        UsageError: The dataset has no known layout.
        ConfigError: The labels are open and the layout does not state them, or it contradicts them.
    """
    if config.data.path is None:
        # The phantom has MM-WHS labels.
        return replace(config, data=replace(config.data, labels=config.data.labels or "mm-whs")), ""
    layout = find(Path(config.data.path), config.data)
    notes = [layout.says]
    if config.data.split_by == "slices":
        notes.append(
            "WARNING: slices of the same patients train, validate and test (data.split_by): the"
            " metrics say nothing about new patients"
        )
    if config.data.labels is None:
        if layout.labels is None:
            raise ConfigError(
                "data.labels is not given, and a table of pairs does not state them",
                expected='[{"name": "background", "value": 0}, ...]',
                remedy="list the labels, or name a preset",
            )
        config = replace(config, data=replace(config.data, labels=layout.labels))
    elif isinstance(layout.labels, list):
        _check_same_labels(config, layout.labels)
    if config.intensity.unit == "auto":
        intensity = _intensity(layout, config.intensity)
        config = replace(config, intensity=intensity)
        notes.append(
            f"intensities are read as {intensity.unit} from {intensity.low} to {intensity.high}"
        )
    if config.data.modality is None and config.intensity.unit != "HU" and layout.modality:
        config = replace(config, data=replace(config.data, modality=layout.modality))
    return config, "; ".join(notes)


def _check_same_labels(config: RunConfig, stated: list[dict[str, Any]]) -> None:
    """Check that the config's table has the layout's values under the same names."""
    table = label_table(replace(config.data, keep=None))
    main = {label.value: label.name for label in table.labels}
    for row in stated:
        name, value = row["name"], row["value"]
        if value not in table.by_value or main.get(value, name).casefold() != name.casefold():
            raise ConfigError(
                f"data.labels and the dataset differ: there {value} is {name}",
                expected=f"the config's {table}",
                remedy="correct one of the two, or set data.labels to null to take the dataset's",
            )


def _intensity(layout: Layout, stated: IntensityConfig) -> IntensityConfig:
    """HU where the first image contains air, else greys in the range that the config states."""
    first = read_image(layout.pairs[0].image).values
    return HU if float(first.min()) <= AIR_HU else replace(stated, unit="a.u.")
