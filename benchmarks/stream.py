"""Suite `stream`: from a mask file to a CT file, against what people run today.

One 300 x 512 x 512 mask, .nii.gz to .nii.gz, a network that paints 256 x 256 (`edge` with random weights, or --model MODEL --run RUN).
Contenders: `Synthesizer.stream`; (a) nibabel, the same weights in eager PyTorch slice by slice, nibabel; (b) SimpleITK, ONNX
Runtime as it comes slice by slice, SimpleITK. All are opened before; each reads and writes files. They resample differently and draw
other noise, so that their outputs are not compared; where the network sees neighbours they give it the same slice again, which
costs the same. Then 20 masks in one run: wall time against the time its slowest stage was busy, and against the processor time of
the whole process divided by its cores, below which no schedule can go.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime import Synthesizer
from runtime.contract import GridPolicy, Intensity, Manifest
from runtime.engines.base import cores
from runtime.files import write_json
from runtime.labels import MM_WHS

from .paired import Contender, Ready

OURS, TORCH, SERIAL = "mask2ct stream", "nibabel → torch eager → nibabel", "SimpleITK → ONNX Runtime → SimpleITK"
MONAI = "MONAI: LoadImage → SliceInferer → SaveImage"
FORMATS = ("nifti", "nii", "dicom")  # what `stream formats` writes
SIDE, SPACING = 512, (0.75, 0.75, 1.0)  # pixels; mm
EDGE_RANGE = Intensity("HU", -1024, 1976)


def groups(model: Path | None, trained: Path | None, backend: str, quick: bool) -> dict[str, list[Contender]]:
    """`stream`: one large mask; `stream formats`: the same written otherwise; `stream many`: a run of masks, beside the bound that its
    stages and its processor set.

    Without a `model`, `edge` with random weights, which nobody has proven: ONNX Runtime has to be asked for by name.
    """
    folder = Path(tempfile.mkdtemp(prefix="mask2ct-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    weights, random = None if trained is None else str(trained), model is None
    if model is None:
        model, backend = edge_model(folder / "model"), "onnx" if backend == "auto" else backend
    manifest = Manifest.load(model)
    slices, each, count = (24, 4, 8) if quick else (300, 60, 20)
    given = {"model": str(model), "mask": str(write_mask(folder / "mask.nii.gz", manifest, slices))}
    found = [Contender(OURS, "benchmarks.stream:ours", {**given, "backend": backend})]
    if random or weights is not None:
        found += [
            Contender(name, f"benchmarks.stream:{make}", {**given, "trained": weights})
            for name, make in ((TORCH, "by_torch"), (MONAI, "by_monai"))
        ]
    found.append(Contender(SERIAL, "benchmarks.stream:by_onnx", given))
    masks = [str(write_mask(folder / "masks" / f"{n}.nii.gz", manifest, each, seed=n)) for n in range(count)]
    whole = Contender(
        f"mask2ct, {count} masks of {each} slices", "benchmarks.stream:many", {"model": str(model), "backend": backend, "masks": masks}
    )
    formats = [Contender(f"mask2ct to {name}", "benchmarks.stream:ours", {**given, "backend": backend, "format": name}) for name in FORMATS]
    return {"stream": found, "stream formats": formats, "stream many": [whole]}


def ours(model: str, mask: str, backend: str, format: str = "nifti") -> Ready:
    synth = Synthesizer.open(model, backend=backend)
    kept = tempfile.TemporaryDirectory()

    def run() -> float:
        out = Path(kept.name) / "out"
        shutil.rmtree(out, ignore_errors=True)
        (result,) = synth.stream([mask], out, format=format)
        assert result.error is None, result.error
        return float(result.slices)

    return Ready(run, facts={"backend": synth.backend})


def many(model: str, backend: str, masks: list[str]) -> Ready:
    """Facts: seconds on the wall, each stage's busy ones, the process' own divided by the cores, and the wall by the largest bound."""
    synth = Synthesizer.open(model, backend=backend)
    kept = tempfile.TemporaryDirectory()
    facts: dict[str, Any] = {"backend": synth.backend}

    def run() -> float:
        out = Path(kept.name) / "out"
        shutil.rmtree(out, ignore_errors=True)
        slices, busy = 0, {"read": 0.0, "paint": 0.0, "write": 0.0}
        wall, cpu = time.perf_counter(), time.process_time()
        for result in synth.stream(masks, out):
            slices += result.slices
            for stage, seconds in result.seconds.items():
                busy[stage] += seconds
        wall, bound = time.perf_counter() - wall, (time.process_time() - cpu) / cores()
        facts.update(wall=wall, busy=busy, processor=bound, wall_by_bound=wall / max(*busy.values(), bound))
        return float(slices)

    return Ready(run, facts=facts)


def write_mask(path: Path, manifest: Manifest, slices: int, seed: int = 0) -> Path:
    """A heart of nested and neighbouring balls in the model's values, uint16, 512 x 512, some of it in every slice."""
    import SimpleITK as sitk

    rng = np.random.default_rng(seed)
    k, h, w = np.ogrid[:slices, :SIDE, :SIDE]
    labels = np.zeros((slices, SIDE, SIDE), np.uint16)
    for label in manifest.labels.labels[1:]:
        row, column, radius = *rng.uniform(180, 330, 2), rng.uniform(40, 80)
        depth = (k - slices / 2) / slices * 1.2 * radius
        labels[depth**2 + (h - row) ** 2 + (w - column) ** 2 < radius**2] = label.value
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(SPACING)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path), True)
    return path


def edge_network() -> Any:
    """The network of train/configs/edge.json with random weights, as a graph in PyTorch."""
    import torch

    from export.graph import LabelsToIntensity
    from train.generator import Generator, initialise

    torch.manual_seed(0)
    net = Generator(len(MM_WHS), kind="edge", filters=32, depth=6, skips=True, textures=8)
    initialise([net])
    return LabelsToIntensity(net, len(MM_WHS), EDGE_RANGE)


def edge_model(folder: Path) -> Path:
    """A model folder of `edge_network`, 256 x 256, FP32, not proven."""
    from export.model_folder import describe_file
    from export.to_onnx import to_onnx

    graph = edge_network()
    divisor = graph.generator.divisor
    grid = GridPolicy((256, 256), (2 * SPACING[0], 2 * SPACING[1]), divisor)
    manifest = Manifest("edge", MM_WHS, grid, EDGE_RANGE, style=0, noise=True, files={})
    folder.mkdir()
    to_onnx(graph, manifest, folder / "model.onnx")
    files = {"model.onnx": describe_file(folder / "model.onnx", "onnx", "fp32")}
    write_json(folder / "manifest.json", replace(manifest, files=files).to_json())
    return folder


def load_graph(trained: str | None) -> Any:
    """A run's network as a graph in PyTorch; without one `edge_network`."""
    if trained is None:
        return edge_network()
    from export.graph import LabelsToIntensity
    from train.checkpoint import load_generator, load_run

    facts = load_run(Path(trained))
    return LabelsToIntensity(load_generator(Path(trained)), len(facts.labels), facts.intensity)


def by_torch(model: str, mask: str, trained: str | None) -> Ready:
    graph, manifest, kept = load_graph(trained), Manifest.load(Path(model)), tempfile.TemporaryDirectory()
    return Ready(lambda: float(torch_serial(graph, manifest, Path(mask), Path(kept.name) / "ct.nii.gz")))


def by_monai(model: str, mask: str, trained: str | None) -> Ready:
    graph, manifest, kept = load_graph(trained), Manifest.load(Path(model)), tempfile.TemporaryDirectory()
    return Ready(lambda: float(monai_serial(graph, manifest, Path(mask), Path(kept.name))))


def torch_serial(graph: Any, manifest: Manifest, mask: Path, out: Path) -> int:
    """(a): the whole volume loaded, then slice by slice through PyTorch, then saved, all with each library's defaults."""
    import nibabel
    import torch
    from torch.nn.functional import interpolate

    image: Any = nibabel.load(mask)
    values = np.asarray(image.dataobj)  # (W, H, D)
    known = np.array([label.value for label in manifest.labels.labels])
    height, width = manifest.grid.canvas
    ct = np.empty(values.shape, np.int16)
    with torch.inference_mode():
        for k in range(values.shape[2]):
            labels = torch.from_numpy(np.searchsorted(known, values[:, :, k].T).astype(np.uint8))[None, None]
            small = interpolate(labels, (height, width), mode="nearest")
            noise = torch.randint(0, 256, (1, height, width), dtype=torch.uint8)
            hu = graph(small.repeat(1, manifest.grid.slices, 1, 1), noise=noise).numpy().view("<i2")[..., 0].astype(np.float32)
            large = interpolate(torch.from_numpy(hu)[None], values.shape[1::-1], mode="bilinear")
            ct[:, :, k] = large[0, 0].round().numpy().T
    nibabel.save(nibabel.Nifti1Image(ct, image.affine), out)
    return int(values.shape[2])


def monai_serial(graph: Any, manifest: Manifest, mask: Path, out: Path) -> int:
    """MONAI's transforms with their defaults, eight slices at once through the network."""
    import torch
    from monai.inferers import SliceInferer
    from monai.transforms import LoadImage, Resize, SaveImage

    image: Any = LoadImage(ensure_channel_first=True, image_only=True)(mask)  # (1, W, H, D)
    canvas, whole = manifest.grid.canvas, tuple(image.shape[1:])
    known = torch.tensor([label.value for label in manifest.labels.labels], dtype=image.dtype)
    small = Resize((canvas[1], canvas[0], whole[2]), mode="nearest")(torch.searchsorted(known, image).float())

    def predict(labels: Any) -> Any:
        """(N, 1, W, H) → HU, the same shape."""
        turned = torch.as_tensor(labels).round().to(torch.uint8).transpose(2, 3).contiguous()
        noise = torch.randint(0, 256, (len(turned), *canvas), dtype=torch.uint8)
        hu = torch.from_numpy(
            graph(turned.repeat(1, manifest.grid.slices, 1, 1), noise=noise).numpy().view("<i2")[..., 0].astype(np.float32)
        )
        return hu.transpose(1, 2)[:, None]

    with torch.inference_mode():
        painted = SliceInferer(roi_size=(canvas[1], canvas[0]), sw_batch_size=8, spatial_dim=2)(small[None], predict)[0]
    large = Resize(whole, mode="trilinear")(painted)
    SaveImage(out, output_ext=".nii.gz", output_dtype=np.int16, separate_folder=False, print_log=False)(large, meta_data=image.meta)
    return int(whole[2])


def by_onnx(model: str, mask: str) -> Ready:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(Path(model) / "model.onnx"), providers=["CPUExecutionProvider"])
    manifest, kept = Manifest.load(Path(model)), tempfile.TemporaryDirectory()
    return Ready(lambda: float(onnx_serial(session, manifest, Path(mask), Path(kept.name) / "ct.nii.gz")))


def onnx_serial(session: Any, manifest: Manifest, mask: Path, out: Path) -> int:
    """(b): read, resampled to the canvas, slice by slice through ONNX Runtime, resampled back, written, all with each library's defaults."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(mask))
    width, height, depth = image.GetSize()
    canvas = manifest.grid.canvas
    small = sitk.Image([canvas[1], canvas[0], depth], sitk.sitkUInt8)
    x, y, z = image.GetSpacing()
    small.SetSpacing((x * width / canvas[1], y * height / canvas[0], z))
    small.SetOrigin(tuple(o + (s - t) / 2 for o, s, t in zip(image.GetOrigin(), small.GetSpacing(), image.GetSpacing(), strict=True)))
    known = np.array([label.value for label in manifest.labels.labels])
    labels = np.searchsorted(known, sitk.GetArrayFromImage(sitk.Resample(image, small, sitk.Transform(), sitk.sitkNearestNeighbor))).astype(
        np.uint8
    )
    rng = np.random.default_rng()
    hu = np.empty(labels.shape, np.int16)
    for k in range(depth):
        noise = rng.integers(0, 256, (1, *canvas), np.uint8)
        hu[k] = session.run(None, {"labels": labels[k : k + 1, None].repeat(manifest.grid.slices, 1), "noise": noise})[0].view("<i2")[
            0, :, :, 0
        ]
    painted = sitk.GetImageFromArray(hu)
    painted.CopyInformation(small)
    sitk.WriteImage(sitk.Resample(painted, image, sitk.Transform(), sitk.sitkLinear, manifest.intensity.low), str(out), True)
    return int(depth)
