"""Deformed masks: plausible, drawn from keyed streams, the topology and the situs kept, on the
grid of the mask they came from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from samples import blobs, results, rotation, synth, write_mask

from runtime import Geometry, LabelVolume, Synthesizer, UsageError
from runtime.core.components import parts
from runtime.core.deformation import DeformationParams, deform
from runtime.engines.fake import FakeEngine, fake_manifest

STILL = DeformationParams(deform=0, rotate=0, scale=0)


def heart(shape: tuple[int, int, int] = (40, 64, 64), step: float = 3.0) -> NDArray[np.uint8]:
    """A shell (1) round a ball (2), a thinner tube (3) that leaves through the last slice, and a
    speck of a fourth label.
    """
    d, h, w = np.ogrid[: shape[0], : shape[1], : shape[2]]
    radius = np.sqrt((step * (d - 16)) ** 2 + (step * (h - 32)) ** 2 + (step * (w - 26)) ** 2)
    labels = np.where(radius < 24, 2, np.where(radius < 33, 1, 0)).astype(np.uint8)
    labels[((h - 30) ** 2 + (w - 44) ** 2 < 12) & (d > 12)] = 3
    labels[20:23, 50:53, 20:23] = 4
    return labels


def volume(
    labels: NDArray[np.uint8],
    spacing: tuple[float, float, float] = (3.0, 3.0, 3.0),
    direction: object = None,
) -> LabelVolume:
    return LabelVolume(
        labels,
        Geometry.from_parts(
            (5.0, -7.0, 11.0), spacing, np.eye(3).ravel() if direction is None else direction
        ),
    )


def centre(labels: NDArray[np.uint8], value: int) -> NDArray[np.float64]:
    return np.argwhere(labels == value).mean(0)


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_first_variant_is_mask_others_differ() -> None:
    """The first variant is the mask; the others differ from it and from each other."""
    source = volume(heart())
    assert deform(source, DeformationParams(), seed=0, variant=0).volume is source
    made = [
        deform(source, DeformationParams(), seed=0, variant=n).volume.labels for n in range(1, 6)
    ]
    assert len({m.tobytes() for m in [source.labels, *made]}) == 6
    for labels in made:
        assert 0.4 < dice(labels == 2, source.labels == 2) < 0.99
        assert 0.5 < (labels == 2).sum() / (source.labels == 2).sum() < 1.7
        assert np.array_equal(parts(labels), parts(source.labels))


def test_same_keys_give_same_variant_mask() -> None:
    """The same keys give the same mask, whatever was made before."""
    source = volume(heart())
    first = deform(source, DeformationParams(), seed=3, variant=2).volume.labels
    for other in (1, 4):
        deform(source, DeformationParams(), seed=3, variant=other)
    assert np.array_equal(
        deform(volume(heart()), DeformationParams(), seed=3, variant=2).volume.labels, first
    )
    assert not np.array_equal(
        deform(source, DeformationParams(), seed=4, variant=2).volume.labels, first
    )


def test_variants_keep_left_and_up() -> None:
    """The tube (3) lies left of, before and above the ball's centre, as the array's axes run; in
    every variant it still does.
    """
    source = volume(heart())
    for variant in range(1, 9):
        labels = deform(source, DeformationParams(), seed=1, variant=variant).volume.labels
        d, _, w = centre(labels, 3) - centre(labels, 2)
        assert d > 5 and w > 10


def handed(labels: NDArray[np.uint8]) -> bool:
    """On which side of the plane through ball, tube and the body's long axis the speck (4) lies:
    a mirror alone changes it.
    """
    ball, tube, speck = (centre(labels, value) for value in (2, 3, 4))
    return bool(np.linalg.det(np.stack([tube - ball, speck - ball, [1, 0, 0]])) > 0)


def test_variants_mirror_only_on_request() -> None:
    source = volume(heart())
    kept = [
        deform(source, DeformationParams(), seed=0, variant=n).volume.labels for n in range(1, 13)
    ]
    free = [
        deform(source, DeformationParams(mirror=True), seed=0, variant=n).volume.labels
        for n in range(1, 13)
    ]
    assert {handed(labels) for labels in kept} == {handed(source.labels)}
    mirrored = [handed(labels) != handed(source.labels) for labels in free]
    assert 2 < sum(mirrored) < 10
    assert all(
        turned or np.array_equal(a, b) for a, b, turned in zip(kept, free, mirrored, strict=True)
    )  # the others are what they were
    assert all(np.array_equal(parts(labels), parts(source.labels)) for labels in free)


def test_mirror_variant_is_exact_about_middle() -> None:
    """A mirror alone is exact, about the middle of the labels."""
    for spin in ("", "flipped"):
        labels = heart()[:, :, ::-1] if spin else heart()
        source = volume(np.ascontiguousarray(labels))
        made = [
            deform(source, DeformationParams(0, 0, 0, mirror=True), seed=0, variant=n).volume.labels
            for n in range(1, 6)
        ]
        held = np.flatnonzero(labels.any((0, 1)))
        expected = np.zeros_like(labels)
        expected[:, :, held[0] : held[-1] + 1] = labels[:, :, held[0] : held[-1] + 1][:, :, ::-1]
        assert {one.tobytes() for one in made} == {source.labels.tobytes(), expected.tobytes()}


def test_mirror_variant_keeps_mask_ct_pair(tmp_path: Path, fake_model: Path) -> None:
    table = fake_manifest().labels
    mask = write_mask(
        tmp_path / "case.nii.gz",
        np.array([label.value for label in table.labels])[heart()],
        spacing=(3.0, 3.0, 3.0),
    )
    assert synth(fake_model, tmp_path / "out", mask, "--variants", "6", "--mirror") == 0
    sides = set()
    for n in range(6):
        generated = tmp_path / "out" / f"case_v{n}_mask.nii.gz"
        labels = np.searchsorted(
            [label.value for label in table.labels],
            sitk.GetArrayFromImage(sitk.ReadImage(str(generated))),
        )
        sides.add(handed(labels.astype(np.uint8)))
        assert synth(fake_model, tmp_path / "again", generated) == 0
        first, second = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(f)))
            for f in (
                tmp_path / "out" / f"case_v{n}_ct.nii.gz",
                tmp_path / "again" / f"case_v{n}_mask_ct.nii.gz",
            )
        )
        assert np.array_equal(first, second)
    assert sides == {False, True}


def test_variants_without_ranges_stay_unmoved() -> None:
    source = volume(heart())
    assert deform(source, STILL, seed=0, variant=1).volume is source


@pytest.mark.parametrize("change", ["rotate", "scale", "deform"])
def test_variant_ranges_bound_their_deformation(change: str) -> None:
    source = volume(heart())
    ranges = {
        "rotate": DeformationParams(0, 20, 0),
        "scale": DeformationParams(0, 0, 0.3),
        "deform": DeformationParams(10, 0, 0),
    }[change]
    ratios, shifts = [], []
    for variant in range(1, 7):
        labels = deform(source, ranges, seed=2, variant=variant).volume.labels
        ratios.append((labels == 2).sum() / (source.labels == 2).sum())
        shifts.append(np.abs(3.0 * (centre(labels, 2) - centre(source.labels, 2))).max())
    if change == "rotate":  # volumes stay
        assert np.allclose(ratios, 1, atol=0.04)
    elif change == "scale":
        assert min(ratios) > 0.7**3 * 0.9 and max(ratios) < 1.35**3 * 1.1 and np.std(ratios) > 0.05
    else:
        assert 0.5 < max(shifts) < 10  # mm


def test_variant_rotation_on_oblique_grid() -> None:
    """A rotation is about the patient's axes, on an oblique grid too."""
    ranges = DeformationParams(deform=0, rotate=30, scale=0, topology=False)
    turn = rotation((0.0, 0.0, 25.0))
    labels = heart()
    plain = deform(volume(labels), ranges, seed=0, variant=1).volume
    # the same voxels, called oblique: what changes is the frame they are turned in, not by how much
    # they turn
    oblique = deform(volume(labels, direction=turn.ravel()), ranges, seed=0, variant=1).volume
    for made in (plain, oblique):
        before, after = (
            made.geometry.direction @ ((centre(x, 3) - centre(x, 2))[::-1] * 3.0)
            for x in (labels, made.labels)
        )
        angle = np.degrees(
            np.arccos(before @ after / np.linalg.norm(before) / np.linalg.norm(after))
        )
        assert angle < 3**0.5 * 30 + 5
    assert not np.array_equal(plain.labels, oblique.labels)


@pytest.mark.parametrize("shape", [(1, 30, 40), (17, 1, 9), (30, 33, 1), (3, 3, 3)])
def test_variants_of_single_slice_volume(shape: tuple[int, int, int]) -> None:
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(n // 4, n - n // 4) for n in shape)] = 1
    made = deform(volume(labels), DeformationParams(), seed=0, variant=1).volume
    assert made.labels.shape == shape and made.labels.any()


def test_variant_labels_still_reach_border() -> None:
    source = volume(heart())
    for variant in range(1, 7):
        made = deform(
            source, DeformationParams(deform=12, rotate=0, scale=0.1), seed=0, variant=variant
        ).volume.labels
        assert (made[-1] == 3).any()  # the tube leaves through the last slice


def test_undeformable_mask_is_kept_and_reported() -> None:
    """A checkerboard of single voxels falls apart whatever is done to it."""
    labels = (np.indices((10, 20, 20)).sum(0) % 7 == 0).astype(np.uint8)
    deformed = deform(volume(labels), DeformationParams(), seed=0, variant=1)
    assert np.array_equal(parts(deformed.volume.labels), parts(labels))
    if deformed.warnings:
        assert "keeps its shape" in deformed.warnings[0] and deformed.volume.labels is labels
    assert not deform(volume(labels), DeformationParams(topology=False), seed=0, variant=1).warnings


def test_variant_jacobian_is_positive_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lattice at its bound, from where each voxel comes, which three ramps of labels
    tell to a voxel.
    """
    n, step = 60, 6
    monkeypatch.setattr(LabelVolume, "digest", b"the same draw for all three")
    ranges = DeformationParams(deform=19, rotate=0, scale=0, topology=False)  # 0.4 of 48 mm
    places = []
    for axis in range(3):
        ramp = np.moveaxis(
            np.broadcast_to(np.arange(1, n + 1, dtype=np.uint8)[:, None, None], (n, n, n)), 0, axis
        )
        places.append(deform(volume(ramp), ranges, seed=5, variant=1).volume.labels.astype(float))
    inner = (slice(8, -8),) * 3  # beyond the border its last voxel stands in
    jacobian = np.stack(
        [
            np.stack([(np.roll(p, -step, a) - p)[inner] / step for a in range(3)], -1)
            for p in places
        ],
        -2,
    )
    determinant = np.linalg.det(jacobian)
    assert determinant.min() > 0 and determinant.std() > 0.1


def test_parts_agree_with_simpleitks_components() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        shape = tuple(rng.integers(1, 12, 3))
        labels = (
            (rng.random(shape) < rng.choice([0.1, 0.3, 0.6])) * rng.integers(1, 4, shape)
        ).astype(np.uint8)
        counted = parts(labels)
        for value in range(1, 4):
            components = sitk.ConnectedComponent(
                sitk.GetImageFromArray((labels == value).astype(np.uint8)), True
            )
            sizes = np.bincount(sitk.GetArrayFromImage(components).ravel())[1:]
            assert counted[value] == (sizes >= 0.01 * sizes.sum()).sum()


def test_variant_ct_and_mask_are_pair(tmp_path: Path) -> None:
    """The fake engine synthesizes a value per label: where the mask holds a label, the CT holds
    its value, voxel for voxel.
    """
    manifest = fake_manifest(noise=False)
    table = np.array([label.value for label in manifest.labels.labels])
    path = write_mask(
        tmp_path / "m.nii.gz", table[heart()].astype(np.uint16), spacing=(3.0, 3.0, 3.0)
    )
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        made = list(opened.stream([path], tmp_path / "out", variants=3, seed=2))
    hu = np.rint(np.linspace(-1024, 1024, len(table)))
    masks = []
    for result in made:
        ct, mask = (sitk.ReadImage(str(file)) for file in result.files)
        assert (ct.GetOrigin(), ct.GetSpacing(), ct.GetDirection()) == (
            mask.GetOrigin(),
            mask.GetSpacing(),
            mask.GetDirection(),
        )
        masks.append(sitk.GetArrayFromImage(mask))
        assert np.array_equal(sitk.GetArrayFromImage(ct), hu[np.searchsorted(table, masks[-1])])
    assert np.array_equal(masks[0], table[heart()]) and not np.array_equal(masks[1], masks[0])


def test_variant_bytes_independent_of_order_batch(tmp_path: Path, fake_model: Path) -> None:
    """Variants have the same bytes in any order, batch and number."""
    paths = [write_mask(tmp_path / f"{n}.nii.gz", blobs((12, 30, 30), seed=n)) for n in range(2)]
    for out, order, extra in (
        ("a", paths, ["--variants", "3"]),
        ("b", paths[::-1], ["--variants", "3", "--batch", "1"]),
        ("c", paths, ["--variants", "4"]),
    ):
        assert synth(fake_model, tmp_path / out, *order, *extra) == 0
    a, b, c = (results(tmp_path / out) for out in "abc")
    assert a == b and a.items() <= c.items() and len(c) == 16


@pytest.mark.parametrize(
    "wrong", [{"deform": -1}, {"rotate": 46}, {"scale": 0.6}, {"deform": float("nan")}]
)
def test_variant_range_out_of_bounds_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="the range"):
        DeformationParams(**wrong)


def test_options_reach_the_variants(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_mask(
        tmp_path / "m.nii.gz",
        np.array([0, 205, 420, 500, 550])[heart()].astype(np.uint16),
        spacing=(3.0, 3.0, 3.0),
    )
    out, two = tmp_path / "out", ("--variants", "2")
    assert synth(fake_model, out, path, *two, "--deform", "0", "--rotate", "0", "--scale", "0") == 0
    made = results(out)
    assert made["m_v0_mask.nii.gz"] == made["m_v1_mask.nii.gz"]
    assert synth(fake_model, out, path, *two) == 0
    assert results(out)["m_v1_mask.nii.gz"] != made["m_v1_mask.nii.gz"]
    assert synth(fake_model, out, path, *two, "--rotate", "90") == 2
    assert "0 to 45 degrees" in capsys.readouterr().err
