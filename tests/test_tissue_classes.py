"""An image becomes tissue classes in one place, and a model states them in its manifest."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from runtime.core.components import plane_components
from runtime.core.context import Context
from runtime.core.manifest import GridPolicy, Manifest
from runtime.core.tissue_classes import HU_CONTEXT, classes_of_volume, context_map, dense_labels
from runtime.core.volume import Geometry
from runtime.engines.fake import fake_manifest

LABELS = 3
FIRST = {name: HU_CONTEXT.index(name, LABELS) for name in HU_CONTEXT.names}


def thorax(size: int = 96) -> NDArray[np.int16]:
    """A body of fat and muscle with two lungs, a vessel in one, a rib, a table below."""
    y, x = np.mgrid[:size, :size].astype(float)
    image = np.full((size, size), -1000)
    ellipse = ((y - 42) / 32) ** 2 + ((x - 48) / 42) ** 2
    image[ellipse < 1] = -100
    image[ellipse < 0.8] = 50
    for centre in (28, 68):
        image[((y - 42) / 18) ** 2 + ((x - centre) / 12) ** 2 < 1] = -860
    image[39:43, 27:31] = 60
    image[20:24, 46:54] = 700
    image[82:83] = 80
    return image.astype(np.int16)[None]


def test_classes_of_a_thorax() -> None:
    classes = context_map(thorax(), HU_CONTEXT, LABELS)[0]
    places = {
        (2, 2): 0,
        (42, 8): FIRST["fat"],
        (42, 48): FIRST["soft"],
        (42, 68): FIRST["gas"],
        (41, 29): FIRST["soft"],
        (22, 50): FIRST["dense"],
        (82, 40): FIRST["table"],
        (90, 40): 0,
    }
    assert {place: int(classes[place]) for place in places} == places
    assert FIRST["unknown"] not in classes


def test_cut_lung_belongs_to_body() -> None:
    image = thorax()[:, :, 26:]
    # The slice ends within a lung; the air above the body reaches the border too.
    classes = context_map(image, HU_CONTEXT, LABELS)[0]
    assert classes[42, 0] == FIRST["gas"] and classes[2, 30] == 0


def test_slice_of_air_has_no_body() -> None:
    assert not context_map(np.full((1, 16, 16), -1000), HU_CONTEXT, LABELS).any()


def test_fine_images_are_blurred_more() -> None:
    rng = np.random.default_rng(0)
    image = (30 + rng.normal(0, 60, (1, 128, 128))).astype(np.float32)
    policy = GridPolicy((64, 64), (3.0, 3.0), 32)
    shares = []
    for mm in (3.0, 0.75):
        geometry = Geometry.from_spacing((mm, mm, 3.0))
        classes = classes_of_volume(image, geometry, HU_CONTEXT, LABELS, policy)
        shares.append(float((classes == FIRST["soft"]).mean()))
    assert shares[0] < 0.97 < shares[1]


def test_classes_follow_the_axis_order() -> None:
    image, policy = np.repeat(thorax(), 3, 0), GridPolicy((96, 96), (3.0, 3.0), 32)
    axial = classes_of_volume(
        image, Geometry.from_spacing((3.0, 3.0, 3.0)), HU_CONTEXT, LABELS, policy
    )
    # Voxel axes: rows of the array run along z, so the last array axis counts the slices.
    turned = np.eye(4)
    turned[:3, :3] = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]]) * 3.0
    other = classes_of_volume(
        image.transpose(2, 1, 0), Geometry(turned), HU_CONTEXT, LABELS, policy
    )
    assert np.array_equal(other, axial.transpose(2, 1, 0))


def test_labels_lie_on_top() -> None:
    context = context_map(thorax(), HU_CONTEXT, LABELS)
    labels = np.zeros(context.shape, np.uint8)
    labels[0, 40:44, 46:50] = 2
    dense = dense_labels(labels, context)
    assert (dense[labels > 0] == 2).all()
    assert np.array_equal(dense[labels == 0], context[labels == 0])


@pytest.mark.parametrize("corners", [False, True])
def test_plane_components_agree_with_scipy(corners: bool) -> None:
    mask = np.random.default_rng(3).random((40, 50)) < 0.45
    ours = plane_components(mask, corners=corners)
    reference, count = ndimage.label(mask, np.ones((3, 3)) if corners else None)
    assert ours.max() == count
    pairs = np.unique(np.stack([ours.ravel(), reference.ravel()]), axis=1)
    assert pairs.shape[1] == count + 1


def manifest_with_context() -> Manifest:
    manifest = fake_manifest()
    classes = len(manifest.labels) + len(HU_CONTEXT)
    context = replace(
        HU_CONTEXT, medians=tuple(range(classes)), contrast=((1.0,) * classes, (0.5,) * classes)
    )
    return replace(manifest, context=context, style=classes, noise_along_z=0.3, modality="CT")


def test_context_survives_the_manifest(root) -> None:
    manifest = manifest_with_context()
    data = json.loads(json.dumps(manifest.to_json()))
    again = Manifest.from_json(data)
    assert again == manifest and again.classes == len(manifest.labels) + 7
    schema = json.loads((root / "runtime" / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(
        {**data, "training": {"weights_sha256": "0" * 64}}
    )
    assert set(schema["properties"]) == set(data)


def test_manifest_without_context_is_unchanged() -> None:
    data = fake_manifest().to_json()
    assert data["schema_version"] == 2 and not {"context", "noise_along_z"} & set(data)
    assert "context" not in json.loads(fake_manifest().signature())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"thresholds": [300, 130, -30, -500]}, "fall"),
        ({"tissues": ["gas"]}, "threshold"),
        ({"medians": [1.0]}, "one"),
        ({"contrast": [[1.0]]}, "length"),
        ({"blur": -1}, "blur"),
        ({"tissues": ["gas", "fat", "soft", "mid", "table"]}, "different names"),
    ],
)
def test_wrong_contexts_are_refused(change: dict, told: str) -> None:
    data = json.loads(json.dumps(manifest_with_context().to_json()))
    data["context"].update(change)
    with pytest.raises(ValueError, match=told):
        Manifest.from_json(data)


def test_context_states_too_many_classes() -> None:
    data = manifest_with_context().to_json()["context"]
    with pytest.raises(ValueError, match="classes"):
        Context.from_json({**data, "medians": [0.0] * 260, "contrast": []}, 253)
