"""Configs: what ships loads, what is wrong is named, the resolved config alone rebuilds the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from runtime.core.errors import ConfigError
from train.config import (
    ORIGINAL_KEYS,
    RunConfig,
    from_json,
    grid_policy,
    label_table,
    load,
    resolve,
    to_json,
)

SHIPPED = sorted((Path(__file__).parent.parent / "train" / "configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_survive_json(path: Path) -> None:
    """Every shipped config resolves and is the same after a passage through JSON."""
    config = resolve(load(path))
    assert config.name == path.stem
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_documented_configs_are_shipped() -> None:
    assert {"phantom", "whs", "whs-lv-myo", "edge", "mr"} <= {path.stem for path in SHIPPED}


def test_phantom_config_needs_no_dataset() -> None:
    """A dataset that is named replaces the phantom."""
    data = load(SHIPPED[0].parent / "phantom.json")
    assert resolve(data).data.phantom is not None
    given = resolve(data, dataset_path="/somewhere").data
    assert (given.path, given.phantom) == ("/somewhere", None)


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("training.step=4", "training.step", "did you mean 'steps'?"),
        ("trainig.steps=4", "trainig", "did you mean 'training'?"),
        ("MAX_ITERS=4", "MAX_ITERS", "did you mean 'MAX_ITER'?"),
        ("training.steps=many", "training.steps", "a whole number of at least 0"),
        ("training.steps=4.5", "training.steps", "a whole number of at least 0"),
        ("training.batch_size=0", "training.batch_size", "of at least 1"),
        ("training.batch_size=true", "training.batch_size", "a whole number"),
        ("data.train_ratio=1.5", "data.train_ratio", "a number from 0 to 1"),
        ("data.canvas=[256]", "data.canvas", "a list of 2, each a whole number"),
        ("data.canvas=[100,100]", "data.canvas", "multiples of 128"),
        ("data.canvas=[128,128],training.batch_size=1", "training.batch_size", "at least 2"),
        ("data.slices=2", "data.slices", "odd"),
        ("data.labels=mmwhs", "data.labels", "mm-whs"),
        ("data.keep=[3,1]", "data.keep", "rising indices"),
        ("data.keep=[9]", "data.keep", "rising indices"),
        ("generator.kind=referense", "generator.kind", "did you mean 'reference'?"),
        ("generator.skips=1", "generator.skips", "true or false"),
        ("generator.texture_kernel=4", "generator.texture_kernel", "an odd number"),
        ("discriminator.patch_size=12", "discriminator.patch_size", "a power of two"),
        ("discriminator.patch_size=256", "discriminator.patch_size", "at most half the canvas"),
        ("intensity.high=-2000", "intensity", "low < high"),
        ("training=4", "training", "a JSON object"),
        ("training.steps", "training.steps", "--set section.key=value"),
    ],
)
def test_wrong_override_names_its_key(override: str, key: str, hint: str) -> None:
    """The message names the key and the values that are allowed."""
    with pytest.raises(ConfigError) as caught:
        resolve({}, re.split(r",(?=[a-z])", override))
    assert key in caught.value.fact and hint in str(caught.value)
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) <= 4


def test_overrides_are_typed_by_their_key() -> None:
    config = resolve(
        {},
        [
            "training.steps=1e3",
            "optimizer.lr_g=1",
            "name=12a",
            "data.keep=[1,3]",
            "data.pixel_spacing=[1.5,2]",
        ],
    )
    assert (config.training.steps, config.optimizer.lr_g, config.name) == (1000, 1.0, "12a")
    assert type(config.training.steps) is int and type(config.optimizer.lr_g) is float
    assert config.data.pixel_spacing == (1.5, 2.0)


def test_original_keys_work_as_aliases() -> None:
    """The original's keys are understood in files and in overrides."""
    theirs = {
        "NAME": "whs",
        "MAX_ITER": 40,
        "BATCH_SIZE": 4,
        "LEARNING_RATE_G": 1e-4,
        "IMAGE_RES": [128, 128],
        "LABELS": [0, 1, 3],
        "ADAM_B1": 0.4,
    }
    config = resolve(theirs, ["PATCH_SIZE=8", "SKIP_CONNECTIONS_GENERATOR=true"])
    assert (
        config.name,
        config.training.steps,
        config.training.batch_size,
        config.optimizer.beta1,
    ) == ("whs", 40, 4, 0.4)
    assert (
        config.data.canvas,
        config.data.keep,
        config.discriminator.patch_size,
        config.generator.skips,
    ) == ((128, 128), (1, 3), 8, True)


def test_original_keys_map_to_config_keys() -> None:
    tree = to_json(RunConfig())
    for ours, _ in ORIGINAL_KEYS.values():
        node = tree
        for part in ours.split("."):
            assert part in node, ours
            node = node[part]


def test_the_defaults_are_the_originals() -> None:
    c = RunConfig()
    assert (c.generator.filters, c.generator.depth, c.generator.skips, c.generator.textures) == (
        64,
        7,
        False,
        0,
    )
    assert (c.discriminator.filters, c.discriminator.patch_size, c.discriminator.conditional) == (
        64,
        16,
        True,
    )
    assert (c.loss.adversarial, c.loss.reconstruction, c.loss.texture) == (1, 100, 0)
    assert (c.data.train_ratio, c.data.valid_ratio, c.data.split_seed) == (0.95, 0.02, 123)
    assert (c.optimizer.lr_g, c.optimizer.lr_d, c.optimizer.beta1, c.training.batch_size) == (
        1.3e-4,
        1.5e-4,
        0.5,
        8,
    )


def test_keep_renumbers_labels() -> None:
    """`data.keep` renumbers the labels and sends the rest to the background."""
    table = label_table(resolve({}, ["data.keep=[1,3]"]).data)
    assert [label.name for label in table.labels] == ["background", "myocardium", "left ventricle"]
    assert table.by_value == {0: 0, 205: 1, 500: 2, 420: 0, 421: 0, 550: 0, 600: 0, 820: 0, 850: 0}


def test_labels_may_be_listed() -> None:
    table = label_table(
        resolve(
            {
                "data": {
                    "labels": [
                        {"name": "background", "value": 0},
                        {"name": "liver", "value": 5, "aliases": [6]},
                    ]
                }
            }
        ).data
    )
    assert table.by_value == {0: 0, 5: 1, 6: 1}
    with pytest.raises(ConfigError, match="row 0 of 'labels' has no key 'value'"):
        resolve({"data": {"labels": [{"name": "background"}]}})


def test_the_grid_policy_follows_the_network() -> None:
    policy = grid_policy(
        resolve({}, ["generator.depth=5", "data.canvas=[96,64]", "data.pixel_spacing=[3,3]"])
    )
    assert (policy.divisor, policy.canvas, policy.pixel_spacing, policy.slices) == (
        32,
        (96, 64),
        (3.0, 3.0),
        1,
    )


def test_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for path in (tmp_path / "absent.json", broken):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert path.name in str(caught.value)
