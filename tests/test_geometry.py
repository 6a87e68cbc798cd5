"""Where voxels lie: axis orders, oblique grids, resampling, files read by independent readers."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from samples import MM_WHS_VALUES, blobs, directions, geometry, image, rotation, write_mask

from runtime import GeometryError, Synthesizer
from runtime.core.manifest import GridPolicy
from runtime.core.resampling import SliceGrid
from runtime.core.volume import Geometry
from runtime.engines.base import EngineSpec
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.io.readers.volume import read_volume
from runtime.io.writers.volume import write_volume

FAKE_HU = dict(zip(MM_WHS_VALUES, np.rint(np.linspace(-1024, 1024, 8)), strict=True))


def fake(**options) -> Synthesizer:
    manifest = fake_manifest(noise=False, **options)
    return Synthesizer(manifest, FakeEngine(manifest), batch=3)


@pytest.mark.parametrize(
    "direction",
    directions(),
    ids=lambda d: "".join(
        "+-"[int(x < 0)] + "xyz"[int(np.argmax(np.abs(c)))] for c in d.T for x in [c.sum()]
    ),
)
@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (11.0, -7.0, 16.0)], ids=["straight", "oblique"])
def test_axis_orders_keep_label_voxels(direction: np.ndarray, tilt) -> None:
    """Every axis order keeps each label at its voxel."""
    values = blobs()
    mask = image(values, (2.0, 2.0, 2.0), direction=rotation(tilt) @ direction)
    with fake(pixel_spacing=(2.0, 2.0)) as synth:
        ct = synth(mask)
    generated = sitk.GetArrayFromImage(ct)
    for value, hu in FAKE_HU.items():
        assert (generated[values == value] == hu).all()
    assert (
        ct.GetOrigin() == mask.GetOrigin()
        and ct.GetSpacing() == mask.GetSpacing()
        and ct.GetDirection() == mask.GetDirection()
    )
    assert ct.GetPixelID() == sitk.sitkInt16


class Coordinates(FakeEngine):
    """Synthesizes 10 x the canvas row + the canvas column: shows how a slice is presented to the
    network.
    """

    def run(self, inputs, out, *, stream) -> None:
        h, w = out.shape[1:3]
        out.view("<i2")[..., 0] = 10 * np.arange(h)[:, None] + np.arange(w)


@pytest.mark.parametrize("direction", directions()[::5], ids=str)
def test_network_input_is_axial(
    direction: np.ndarray,
) -> None:
    """The network sees axial slices, whose first row is anterior and first column is right."""
    manifest = fake_manifest(noise=False, pixel_spacing=(2.0, 2.0))
    mask = image(np.full((10, 12, 14), 205, np.uint16), (2.0, 2.0, 2.0), (0, 0, 0), direction)
    with Synthesizer(manifest, Coordinates(manifest)) as synth:
        ct = synth(mask)
    inverse = np.linalg.inv(geometry(ct).affine)
    centre = geometry(ct).affine @ [6.5, 5.5, 4.5, 1]

    def at(x: float, y: float, z: float) -> int:
        i, j, k = np.rint((inverse @ (centre + np.array([x, y, z, 0])))[:3]).astype(int)
        return int(sitk.GetArrayFromImage(ct)[k, j, i])

    assert at(4, 0, 0) - at(-4, 0, 0) == 4  # 8 mm towards the left: 4 columns of 2 mm
    assert at(0, 4, 0) - at(0, -4, 0) == 40  # 8 mm towards posterior: 4 rows
    assert at(0, 0, 4) == at(0, 0, -4)


def test_neighbour_slice_distance_in_mm() -> None:
    """Neighbour slices are chosen by their distance in mm, towards the head."""
    seen: list[np.ndarray] = []

    class Record(FakeEngine):
        def run(self, inputs, out, *, stream) -> None:
            seen.append(inputs["labels"][:, :, 16, 16].copy())
            super().run(inputs, out, stream=stream)

    manifest = fake_manifest(slices=3, noise=False)  # 3 mm apart
    values = np.zeros((8, 8, 8), np.uint16)
    values[...] = np.array(MM_WHS_VALUES, np.uint16)[:, None, None]  # slice k holds index k
    for direction, spacing, expected in (
        (np.eye(3), 3.0, [3, 4, 5]),
        (np.eye(3), 1.5, [2, 4, 6]),
        (np.diag([1.0, -1.0, -1.0]), 3.0, [5, 4, 3]),  # k runs towards the feet
    ):
        seen.clear()
        with Synthesizer(manifest, Record(manifest, batch=1)) as synth:
            synth(image(values, (3.0, 3.0, spacing), direction=direction))
        assert seen[4][0].tolist() == expected
        assert seen[0][0].tolist()[1:2] == [0]


def test_neighbour_distance_is_constant() -> None:
    """15 mm at 2 mm is 7.5 slices: always rounded the same way, not to 7 here and 8 there."""
    volume = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    grid = SliceGrid(
        GridPolicy((4, 4), (1.0, 1.0), 4, 3, 15.0),
        Geometry(np.diag([1.0, 1.0, 2.0, 1.0])),
        volume.shape,
    )
    for k in range(8, 32):
        assert grid.labels(volume, k)[:, 0, 0].tolist() == [k - 8, k, k + 8]


def write(path: Path, values: np.ndarray, grid: Geometry) -> None:
    write_volume(path, values, values.shape, values.dtype, grid)


@pytest.mark.parametrize("angle", [179.0, 179.9, 179.99, 180.0])
def test_half_turn_qform_agrees_with_sform(angle: float, tmp_path: Path) -> None:
    """A qform near a half turn agrees with the sform, or it is not stated."""
    g = Geometry.from_parts((0, 0, 0), (0.71, 0.71, 1.25), rotation((0.3, angle, 0.2)).ravel())
    write(tmp_path / "x.nii", np.zeros((300, 8, 8), np.uint8), g)
    header = nibabel.load(tmp_path / "x.nii").header
    if header["qform_code"]:
        assert np.abs((header.get_qform() - header.get_sform()) @ [7, 7, 299, 1]).max() <= 2e-4


def on_the_mask(
    grid: SliceGrid, ct: np.ndarray, shape: tuple[int, ...], outside: int = 0
) -> np.ndarray:
    """`ct` back on a slice of `shape`, of which every voxel has to be filled."""
    slices = [np.full(shape, filled, np.int16) for filled in (-30000, 30000)]
    for out in slices:
        grid.back(ct, out, outside)
    assert np.array_equal(*slices)
    return slices[0]


def test_linear_ramp_survives_canvas_resampling() -> None:
    """A linear ramp survives the way to the canvas and back.

    Linear interpolation is exact on a ramp in mm, whatever the two spacings.
    """
    shape, spacing = (3, 40, 52), (1.3, 0.9, 2.0)
    g = Geometry.from_parts((5, -3, 0), spacing, np.eye(3).ravel())
    x, y = np.meshgrid(np.arange(52) * spacing[0], np.arange(40) * spacing[1])
    ramp = (3 * x - 5 * y).astype(np.float32)
    grid = SliceGrid(GridPolicy((32, 48), (2.1, 1.7), 16), g, shape)
    canvas = grid.image(np.broadcast_to(ramp, shape), 1, outside=0.0)
    back = on_the_mask(grid, np.rint(canvas).astype(np.int16), shape[1:])
    inner = (slice(3, -3), slice(3, -3))  # beyond the outermost canvas pixels the last value holds
    assert np.abs(back[inner] - ramp[inner]).max() <= 1.0


@pytest.mark.parametrize(
    ("direction", "lies"),
    [
        (np.eye(3), lambda ct: ct),
        (np.diag([-1, 1, -1]), lambda ct: ct[:, ::-1]),
        (
            np.diag([1, -1, 1])[:, [1, 0, 2]],
            lambda ct: ct.T[:, ::-1],
        ),  # the last axis runs from posterior to anterior
    ],
)
def test_slice_resampling_is_bilinear(direction: np.ndarray, lies) -> None:
    """A slice comes back from the canvas by bilinear interpolation, in any orientation.

    Against double precision, of a slice of several strips of rows, the last of them not whole.
    """
    shape, canvas = (1, 150, 150), (48, 64)
    grid = SliceGrid(
        GridPolicy(canvas, None, 16),
        Geometry.from_parts((0, 0, 0), (1, 1, 1), direction.ravel()),
        shape,
    )
    ct = np.random.default_rng(0).integers(-1000, 1000, canvas).astype(np.int16)
    places = [np.clip((np.arange(150) + 0.5) * side / 150 - 0.5, 0, side - 1) for side in canvas]
    low = [np.minimum(p.astype(int), side - 2) for p, side in zip(places, canvas, strict=True)]
    weights = [np.stack([1 - (p - n), p - n]) for p, n in zip(places, low, strict=True)]
    want = sum(
        weights[0][a][:, None]
        * weights[1][b]
        * ct[np.ix_(low[0] + a, low[1] + b)].astype(np.float64)
        for a in (0, 1)
        for b in (0, 1)
    )
    assert np.abs(on_the_mask(grid, ct, shape[1:]) - lies(want)).max() <= 0.5 + 1e-3


def test_equal_spacing_copies_pixels() -> None:
    """Equal spacing copies pixels even where the two sizes differ by an odd number."""
    for extent in (31, 32, 33):
        ct = np.arange(2 * extent * extent).reshape(2, extent, extent).astype(np.int16)
        grid = SliceGrid(GridPolicy((64, 64), (1.0, 1.0), 64), Geometry(np.eye(4)), ct.shape)
        assert np.array_equal(
            on_the_mask(grid, grid.image(ct, 1, 0).astype(np.int16), (extent, extent)), ct[1]
        )


def corner_labels(shape: tuple[int, int, int], *places: tuple[int, int]) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    for row, column in places:
        labels[0, row, column] = 1
    return labels


@pytest.mark.parametrize(
    ("places", "size", "rows"),
    [
        ([(50, 50)], (32, 32), (34, 66)),  # the middle of the slice
        ([(5, 50)], (32, 32), (4, 36)),  # moved to hold the label, with a pixel to spare
        ([(95, 50)], (32, 32), (65, 97)),
        ([(10, 50), (60, 50)], (64, 32), (9, 73)),  # grown, by a multiple of the divisor
        ([], (32, 32), (34, 66)),
    ],
)
def test_larger_slice_is_cropped_to_canvas(places, size, rows) -> None:
    """A slice larger than the canvas is cut to it about its labels."""
    shape = (1, 100, 100)
    labels = corner_labels(shape, *places)
    grid = SliceGrid(GridPolicy((32, 32), (1.0, 1.0), 32), Geometry(np.eye(4)), shape, labels)
    assert grid.size == size and not grid.covers
    generated = on_the_mask(grid, np.full(size, 7, np.int16), shape[1:], -1024)
    assert tuple(np.flatnonzero((generated == 7).any(1))[[0, -1]] + [0, 1]) == rows
    assert (generated[labels[0] > 0] == 7).all()  # no label is ever beyond the canvas
    assert ((generated == 7) | (generated == -1024)).all()


def test_smaller_slice_is_centred_on_canvas() -> None:
    """A smaller slice lies in the middle of the canvas; one without spacing is fitted to it."""
    small = SliceGrid(GridPolicy((64, 64), (2.0, 2.0), 32), Geometry(np.eye(4)), (1, 10, 20))
    assert small.size == (64, 64) and small.covers
    marked = np.zeros((64, 64), np.int16)
    marked[28:36, 26:38] = 5
    assert (
        on_the_mask(small, marked, (10, 20)) == 5
    ).all()  # 10 x 20 mm: 5 x 10 pixels, with their neighbours
    fitted = SliceGrid(GridPolicy((64, 64), None, 32), Geometry(np.eye(4)), (1, 10, 300))
    assert fitted.size == (64, 64) and fitted.covers


def test_labels_beyond_canvas_warn(tmp_path: Path, fake_model: Path) -> None:
    values = np.zeros((4, 60, 60), np.uint16)
    values[:, 50:55, 50:55] = 500
    path = write_mask(tmp_path / "wide.nii.gz", values, spacing=(3.0, 3.0, 3.0))
    with Synthesizer.open(fake_model, backend="fake") as synth:
        (result,) = synth.stream([path], tmp_path / "out")
    assert any(
        "more than the 96 x 96 mm the model was trained on" in warning
        for warning in result.warnings
    )
    ct = sitk.GetArrayFromImage(sitk.ReadImage(str(result.files[0])))
    assert (ct[values == 500] == FAKE_HU[500]).all() and (ct[:, :20, :20] == -1024).all()


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (10.0, 20.0, -5.0)], ids=["straight", "oblique"])
def test_written_grid_equals_mask_grid(suffix: str, tilt, tmp_path: Path, fake_model: Path) -> None:
    path = write_mask(
        tmp_path / f"case{suffix}",
        spacing=(0.71, 0.83, 2.5),
        origin=(-101.37, 12.11, 777.7),
        direction=rotation(tilt),
    )
    with Synthesizer.open(fake_model, backend="fake") as synth:
        (result,) = synth.stream([path], tmp_path / "out")
    assert result.error is None
    mask, ct = sitk.ReadImage(str(path)), sitk.ReadImage(str(result.files[0]))
    assert ct.GetSize() == mask.GetSize() and ct.GetPixelID() == sitk.sitkInt16
    if suffix.startswith(".nii"):
        assert (ct.GetOrigin(), ct.GetSpacing(), ct.GetDirection()) == (
            mask.GetOrigin(),
            mask.GetSpacing(),
            mask.GetDirection(),
        )
        a, b = nibabel.load(path), nibabel.load(result.files[0])
        assert (
            np.array_equal(a.affine, b.affine) and a.header["qform_code"] == b.header["qform_code"]
        )
        assert np.array_equal(a.header.get_qform(), b.header.get_qform())
    corner = [n - 1 for n in mask.GetSize()]
    for index in ([0, 0, 0], corner):
        assert np.allclose(
            ct.TransformIndexToPhysicalPoint(index),
            mask.TransformIndexToPhysicalPoint(index),
            atol=1e-4,
        )


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 2), (1, 1)])
def test_nibabel_header_codes_and_affines(
    order: str, qform: int, sform: int, tmp_path: Path, fake_model: Path
) -> None:
    """Headers that nibabel writes keep their codes and affines."""
    affine = np.eye(4)
    affine[:3, :3] = rotation((5, 6, 7)) * [-0.9, -1.1, 2.2]
    affine[:3, 3] = [90.1, 80.2, -70.3]
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(np.int16)
    made = nibabel.Nifti1Image(np.asfortranarray(blobs().T.astype(np.int16)), None, header)
    made.header.set_qform(affine, qform)
    made.header.set_sform(affine, sform)
    made.header["descrip"] = b"DOE^JANE 1970-01-01"
    path = tmp_path / "case.nii"
    nibabel.save(made, path)
    with Synthesizer.open(fake_model, backend="fake") as synth:
        (result,) = synth.stream([path], tmp_path / "out")
    a, b = nibabel.load(path), nibabel.load(result.files[0])
    assert np.array_equal(a.affine, b.affine)
    assert (int(b.header["qform_code"]), int(b.header["sform_code"])) == (qform, sform)
    assert b"DOE" not in bytes(b.header.binaryblock) and b"NOT FOR DIAGNOSIS" in bytes(
        b.header["descrip"]
    )


@pytest.mark.parametrize("direction", directions()[::3], ids=str)
def test_new_grid_agrees_with_simpleitk_nibabel(direction: np.ndarray, tmp_path: Path) -> None:
    """A grid that is written anew lies where SimpleITK and nibabel read it."""
    g = Geometry.from_parts(
        (12.5, -90.0, 300.25), (0.7, 0.9, 3.1), (rotation((12, -8, 25)) @ direction).ravel()
    )
    write(tmp_path / "x.nii.gz", np.zeros((4, 5, 6), np.int16), g)
    itk, nib = sitk.ReadImage(str(tmp_path / "x.nii.gz")), nibabel.load(tmp_path / "x.nii.gz")
    for index in ([0, 0, 0], [5, 4, 3], [5, 0, 2]):
        expected = (g.affine @ [*index, 1])[:3]
        assert np.allclose(itk.TransformIndexToPhysicalPoint(index), expected, atol=1e-3)
        for affine in (nib.header.get_sform(), nib.header.get_qform()):
            assert np.allclose((affine @ [*index, 1])[:3] * [-1, -1, 1], expected, atol=1e-3)


def test_geometry_refuses_bad_grids() -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    flat = np.diag([1.0, 0.0, 1.0, 1.0])
    for affine in (sheared, flat, np.full((4, 4), np.nan), np.eye(3)):
        with pytest.raises(GeometryError):
            Geometry(affine)


def test_geometry_is_frozen() -> None:
    g = Geometry(np.eye(4))
    with pytest.raises(ValueError, match="read-only"):
        g.affine[0, 0] = 2


def test_reading_agrees_across_stored_orientations(real_data: Path) -> None:
    """One volume stored in RAS, LPS, LAS and ASR order: its brightest tenth has one centre in
    mm.
    """
    centres = []
    for name in ("RAS", "LPS", "LAS", "ASR"):
        volume = read_volume(real_data / "orientations" / f"{name}.nii.gz")
        k, j, i = np.argwhere(volume.values > np.percentile(volume.values, 90)).mean(0)
        centres.append((volume.geometry.affine @ [i, j, k, 1])[:3])
    assert np.allclose(centres, [-9.6326, 24.6165, 6.3315], atol=1e-3)  # as nibabel has it, in LPS


def test_engine_spec_equals_manifest() -> None:
    manifest = fake_manifest()
    spec = FakeEngine(manifest).spec
    assert spec == EngineSpec(manifest.inputs, manifest.output, 2, spec.streams)
