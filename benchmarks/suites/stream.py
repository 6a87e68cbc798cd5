"""Suite `stream`: from a mask file to a CT file, against what people run today.

One 300 x 512 x 512 mask, .nii.gz to .nii.gz, and a network that synthesizes 256 x 256 (`edge`,
barely trained, or --model MODEL --run RUN). Contenders: `Synthesizer.stream`; (a) nibabel, the same
weights in eager PyTorch slice by slice, nibabel; (b) SimpleITK, ONNX Runtime with its defaults
slice by slice, SimpleITK. All are opened before; each reads and writes files. They resample
differently and draw other noise, so that their outputs are not compared. Where the network sees
neighbours they give it the same slice again, which costs the same. Then 20 masks in one run: wall
time against the time that its slowest stage was busy, and against the processor time of the whole
process divided by its cores, which no schedule can beat.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from runtime import Synthesizer
from runtime.core.manifest import Manifest
from runtime.engines.base import cores

from ..harness.libraries import network
from ..harness.models import Prepared
from ..harness.paired import Contender, Ready
from .engine import macs

OURS, TORCH, SERIAL = (
    "mask2ct stream",
    "nibabel → torch eager → nibabel",
    "SimpleITK → ONNX Runtime → SimpleITK",
)
MONAI = "MONAI: LoadImage → SliceInferer → SaveImage"
THEIRS = {TORCH: "by_torch", MONAI: "by_monai"}
FORMATS = ("nifti", "nii", "dicom")  # what `stream formats` writes
SIDE, SPACING = 512, 0.75  # pixels; mm
SIZES, QUICK_SIZES = (
    ((64, 128, 128), (128, 256, 256), (300, 512, 512)),
    ((16, 128, 128), (16, 512, 512)),
)


def groups(prepared: Prepared, backend: str, quick: bool) -> dict[str, list[Contender]]:
    """The contenders.

    Args:
        prepared: The model, and its run folder for PyTorch.
        backend: The backend of our engine.
        quick: Smaller masks.

    Returns:
        "stream": one large mask. "stream sizes": three sizes in two formats. "stream formats": the
        large mask, written in each format. "stream many": a run of masks.
    """
    folder = new_folder()
    manifest, model = Manifest.load(prepared.model), str(prepared.model)
    slices, each, count = (24, 4, 8) if quick else (300, 60, 20)
    cost = macs(prepared.model)
    mask = {
        "model": model,
        "mask": str(write_mask(folder / "mask.nii.gz", manifest, (slices, SIDE, SIDE))),
    }

    def record(
        name: str, arguments: dict[str, Any], backend: str = backend, make: str = "ours"
    ) -> Contender:
        return Contender(
            name,
            f"benchmarks.suites.stream:{make}",
            {**arguments, "backend": backend},
            cost={"int8" if "int8" in backend else "fp32": cost},
        )

    large = [record(OURS, mask)]
    if "openvino-int8" in manifest.parity.get(str(manifest.file_of("onnx", "int8")), {}):
        large.append(record(f"{OURS}, INT8", mask, "openvino-int8"))
    if prepared.trained is not None:
        weights = {**mask, "trained": str(prepared.trained)}
        large += [
            Contender(name, f"benchmarks.suites.stream:{make}", weights, cost={"fp32": cost})
            for name, make in THEIRS.items()
        ]
    large.append(Contender(SERIAL, "benchmarks.suites.stream:by_onnx", mask, cost={"fp32": cost}))

    sizes = []
    for shape in QUICK_SIZES if quick else SIZES:
        name = "x".join(map(str, shape))
        options = {
            "model": model,
            "mask": str(write_mask(folder / name / "mask.nii.gz", manifest, shape)),
        }
        sizes += [
            record(f"{name} to {format}", {**options, "format": format})
            for format in ("nifti", "dicom")
        ]

    masks = [
        str(write_mask(folder / "masks" / f"{n}.nii.gz", manifest, (each, SIDE, SIDE), seed=n))
        for n in range(count)
    ]
    many = record(
        f"mask2ct, {count} masks of {each} slices", {"model": model, "masks": masks}, make="many"
    )
    formats = [record(f"mask2ct to {name}", {**mask, "format": name}) for name in FORMATS]
    return {
        "stream": large,
        "stream sizes": sizes,
        "stream formats": formats,
        "stream many": [many],
    }


def ours(model: str, mask: str, backend: str, format: str = "nifti") -> Ready:
    """`Synthesizer.stream` with one mask.

    Args:
        model: The model folder.
        mask: The mask's file.
        backend: The backend.
        format: The result's format.

    Returns:
        The contender; its unit is slices. Facts of the last run: volumes a second, each stage's
        busy share of the wall time, and the busiest stage.
    """
    synth, out = Synthesizer.open(model, backend=backend), new_folder()
    facts: dict[str, Any] = {"backend": synth.backend}

    def run() -> float:
        before = time.perf_counter()
        (result,) = synth.stream([mask], out, format=format)
        wall = time.perf_counter() - before
        assert result.error is None, result.error
        busy = {stage: round(seconds / wall, 3) for stage, seconds in result.seconds.items()}
        facts.update(
            volumes_per_second=float(f"{1 / wall:.3g}"),
            busy=busy,
            limits=max(busy, key=lambda stage: busy[stage]),
        )
        return float(result.slices)

    return Ready(run, facts=facts, folder=out)


def many(model: str, backend: str, masks: list[str]) -> Ready:
    """`Synthesizer.stream` with many masks.

    Args:
        model: The model folder.
        backend: The backend.
        masks: The masks' files.

    Returns:
        The contender; its unit is slices. Facts, in seconds: wall time, each stage's busy time, the
        process' time divided by the cores; and wall time / the largest of these bounds.
    """
    synth, out = Synthesizer.open(model, backend=backend), new_folder()
    facts: dict[str, Any] = {"backend": synth.backend}

    def run() -> float:
        slices, busy = 0, {"read": 0.0, "synthesize": 0.0, "write": 0.0}
        wall, cpu = time.perf_counter(), time.process_time()
        for result in synth.stream(masks, out):
            slices += result.slices
            for stage, seconds in result.seconds.items():
                busy[stage] += seconds
        wall, bound = time.perf_counter() - wall, (time.process_time() - cpu) / cores()
        facts.update(
            wall=wall, busy=busy, processor=bound, wall_by_bound=wall / max(*busy.values(), bound)
        )
        return float(slices)

    return Ready(run, facts=facts, folder=out)


def new_folder() -> Path:
    """Make a temporary folder, which goes when the process ends.

    Returns:
        The folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="mask2ct-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write_mask(path: Path, manifest: Manifest, shape: tuple[int, int, int], seed: int = 0) -> Path:
    """Write a heart of nested and neighbouring balls, some of it in every slice.

    Args:
        path: The file to write.
        manifest: The model's manifest, for the labels' values.
        shape: (D, H, W).
        seed: Of the random generator.

    Returns:
        `path`.
    """
    import SimpleITK as sitk

    rng, (slices, rows, columns) = np.random.default_rng(seed), shape
    k, h, w = np.ogrid[:slices, :rows, :columns]
    labels = np.zeros(shape, np.uint16)
    for label in manifest.labels.labels[1:]:
        row, column, radius = (
            rows / SIDE * n for n in (*rng.uniform(180, 330, 2), rng.uniform(40, 80))
        )
        depth = (k - slices / 2) / slices * 1.2 * radius
        labels[depth**2 + (h - row) ** 2 + (w - column) ** 2 < radius**2] = label.value
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing((SIDE / columns * SPACING, SIDE / rows * SPACING, 1.0))
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path), True)
    return path


def by_torch(model: str, mask: str, trained: str) -> Ready:
    """Contender: nibabel, PyTorch slice by slice, nibabel.

    Args:
        model: The model folder.
        mask: The mask's file.
        trained: The run folder.

    Returns:
        The contender; its unit is slices.
    """
    graph, manifest, out = network(trained), Manifest.load(Path(model)), new_folder()
    return Ready(
        lambda: float(torch_serial(graph, manifest, Path(mask), out / "ct.nii.gz")), folder=out
    )


def by_monai(model: str, mask: str, trained: str) -> Ready:
    """Contender: MONAI's transforms and inferer.

    Args:
        model: The model folder.
        mask: The mask's file.
        trained: The run folder.

    Returns:
        The contender; its unit is slices.
    """
    graph, manifest, out = network(trained), Manifest.load(Path(model)), new_folder()
    return Ready(lambda: float(monai_serial(graph, manifest, Path(mask), out)), folder=out)


def torch_serial(graph: Any, manifest: Manifest, mask: Path, out: Path) -> int:
    """Load the whole volume, run PyTorch slice by slice, save; all with defaults.

    Args:
        graph: The network.
        manifest: The model's manifest.
        mask: The mask's file.
        out: The file to write.

    Returns:
        The number of slices.
    """
    import nibabel
    import torch
    from torch.nn.functional import interpolate

    image: Any = nibabel.load(mask)
    values = np.asarray(image.dataobj)  # (W, H, D)
    label_values = np.array([label.value for label in manifest.labels.labels])
    height, width = manifest.grid.canvas
    ct = np.empty(values.shape, np.int16)
    with torch.inference_mode():
        for k in range(values.shape[2]):
            labels = torch.from_numpy(
                np.searchsorted(label_values, values[:, :, k].T).astype(np.uint8)
            )[None, None]
            small = interpolate(labels, (height, width), mode="nearest")
            noise = torch.randint(0, 256, (1, height, width), dtype=torch.uint8)
            hu = (
                graph(small.repeat(1, manifest.grid.slices, 1, 1), noise=noise)
                .numpy()
                .view("<i2")[..., 0]
                .astype(np.float32)
            )
            large = interpolate(torch.from_numpy(hu)[None], values.shape[1::-1], mode="bilinear")
            ct[:, :, k] = large[0, 0].round().numpy().T
    nibabel.save(nibabel.Nifti1Image(ct, image.affine), out)
    return int(values.shape[2])


def monai_serial(graph: Any, manifest: Manifest, mask: Path, out: Path) -> int:
    """MONAI's transforms with their defaults, eight slices at once through the network.

    Args:
        graph: The network.
        manifest: The model's manifest.
        mask: The mask's file.
        out: The folder to write to.

    Returns:
        The number of slices.
    """
    import torch
    from monai.inferers import SliceInferer
    from monai.transforms import LoadImage, Resize, SaveImage

    image: Any = LoadImage(ensure_channel_first=True, image_only=True)(mask)  # (1, W, H, D)
    canvas, size = manifest.grid.canvas, tuple(image.shape[1:])
    label_values = torch.tensor(
        [label.value for label in manifest.labels.labels], dtype=image.dtype
    )
    small = Resize((canvas[1], canvas[0], size[2]), mode="nearest")(
        torch.searchsorted(label_values, image).float()
    )

    def predict(labels: Any) -> Any:
        """(N, 1, W, H) → HU, the same shape."""
        turned = torch.as_tensor(labels).round().to(torch.uint8).transpose(2, 3).contiguous()
        noise = torch.randint(0, 256, (len(turned), *canvas), dtype=torch.uint8)
        hu = torch.from_numpy(
            graph(turned.repeat(1, manifest.grid.slices, 1, 1), noise=noise)
            .numpy()
            .view("<i2")[..., 0]
            .astype(np.float32)
        )
        return hu.transpose(1, 2)[:, None]

    with torch.inference_mode():
        generated = SliceInferer(roi_size=(canvas[1], canvas[0]), sw_batch_size=8, spatial_dim=2)(
            small[None], predict
        )[0]
    large = Resize(size, mode="trilinear")(generated)
    SaveImage(
        out, output_ext=".nii.gz", output_dtype=np.int16, separate_folder=False, print_log=False
    )(large, meta_data=image.meta)
    return int(size[2])


def by_onnx(model: str, mask: str) -> Ready:
    """Contender: SimpleITK, ONNX Runtime slice by slice, SimpleITK.

    Args:
        model: The model folder.
        mask: The mask's file.

    Returns:
        The contender; its unit is slices.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(Path(model) / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    manifest, out = Manifest.load(Path(model)), new_folder()
    return Ready(
        lambda: float(onnx_serial(session, manifest, Path(mask), out / "ct.nii.gz")), folder=out
    )


def onnx_serial(session: Any, manifest: Manifest, mask: Path, out: Path) -> int:
    """Read, resample, run ONNX Runtime slice by slice, resample back, write; all with defaults.

    Args:
        session: An ONNX Runtime session.
        manifest: The model's manifest.
        mask: The mask's file.
        out: The file to write.

    Returns:
        The number of slices.
    """
    import SimpleITK as sitk

    image = sitk.ReadImage(str(mask))
    width, height, depth = image.GetSize()
    canvas = manifest.grid.canvas
    small = sitk.Image([canvas[1], canvas[0], depth], sitk.sitkUInt8)
    x, y, z = image.GetSpacing()
    small.SetSpacing((x * width / canvas[1], y * height / canvas[0], z))
    small.SetOrigin(
        tuple(
            o + (s - t) / 2
            for o, s, t in zip(
                image.GetOrigin(), small.GetSpacing(), image.GetSpacing(), strict=True
            )
        )
    )
    label_values = np.array([label.value for label in manifest.labels.labels])
    labels = np.searchsorted(
        label_values,
        sitk.GetArrayFromImage(
            sitk.Resample(image, small, sitk.Transform(), sitk.sitkNearestNeighbor)
        ),
    ).astype(np.uint8)
    rng = np.random.default_rng()
    hu = np.empty(labels.shape, np.int16)
    for k in range(depth):
        noise = rng.integers(0, 256, (1, *canvas), np.uint8)
        hu[k] = session.run(
            None,
            {"labels": labels[k : k + 1, None].repeat(manifest.grid.slices, 1), "noise": noise},
        )[0].view("<i2")[0, :, :, 0]
    generated = sitk.GetImageFromArray(hu)
    generated.CopyInformation(small)
    sitk.WriteImage(
        sitk.Resample(generated, image, sitk.Transform(), sitk.sitkLinear, manifest.intensity.low),
        str(out),
        True,
    )
    return int(depth)
