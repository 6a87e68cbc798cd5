"""From a mask file to a CT file, against what people run today:  python benchmarks/run.py stream

One 300 x 512 x 512 mask, .nii.gz to .nii.gz, a network that paints 256 x 256 (`edge` with random weights, or --model MODEL --run RUN).
Contenders: `Synthesizer.stream`; (a) nibabel, the same weights in eager PyTorch slice by slice, nibabel; (b) SimpleITK, ONNX
Runtime as it comes slice by slice, SimpleITK. They take turns within every round. All are opened before; each reads and writes
files. Then 20 masks in one run: wall time against the time its slowest stage was busy, and against the processor time of the whole
process divided by its cores, below which no schedule can go. And a process of its own: seconds for `import runtime`, and from then on to the first
slab that is handed to the compressor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

import numpy as np

from benchmarks.record import machine
from benchmarks.run import Contender, measure, summarise
from runtime import Synthesizer
from runtime.console import EXIT_CODES, run
from runtime.contract import GridPolicy, Intensity, Manifest
from runtime.engines.host import cores
from runtime.files import write_json
from runtime.labels import MM_WHS

OURS, TORCH, SERIAL = "mask2ct stream", "nibabel → torch eager → nibabel", "SimpleITK → ONNX Runtime → SimpleITK"
SIDE, SPACING = 512, (0.75, 0.75, 1.0)  # pixels; mm
COLD = """
import json, sys, time
started = time.perf_counter()
import runtime
imported = time.perf_counter()
first = []
def painted(n):
    first.append(time.perf_counter())
    if len(first) == 1:
        print(json.dumps({"import": imported - started, "first_slab": first[0] - imported}), flush=True)
with runtime.Synthesizer.open(sys.argv[1]) as synth:
    list(synth.stream([sys.argv[2]], sys.argv[3], on_slice=painted))
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("run.py stream", description="Mask files to CT files on this machine.", epilog=EXIT_CODES)
    parser.add_argument("--model", type=Path, help="a model folder with model.onnx (default: `edge` at 256 x 256 with random weights)")
    parser.add_argument("--run", type=Path, help="the run folder it came from: adds eager PyTorch")
    parser.add_argument("--backend", default="auto", help="what runs the model in `mask2ct stream` (default: %(default)s)")
    parser.add_argument("--slices", type=int, help="of the mask (default: 300, with --quick 24)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer slices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        record = _measured(options, Path(folder))
    if options.json:
        write_json(options.json, record)
    print(json.dumps(record))
    return 0


def _measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, graph = _model(options, folder)
    manifest = Manifest.load(model)
    slices, each, count = (24, 4, 8) if options.quick else (300, 60, 20)
    slices = options.slices or slices
    mask = write_mask(folder / "mask.nii.gz", manifest, slices)
    cold = _cold(model, mask, folder / "cold")
    with Synthesizer.open(model, backend=options.backend) as synth:
        contenders: dict[str, Contender] = {OURS: lambda: _ours(synth, mask, folder / "ours")}
        if graph is not None:
            contenders[TORCH] = lambda: torch_serial(graph, manifest, mask, folder / "torch.nii.gz")
        session = _session(model / "model.onnx")
        contenders[SERIAL] = lambda: onnx_serial(session, manifest, mask, folder / "serial.nii.gz")
        spent: dict[str, list[float]] = {name: [] for name in contenders}
        counted = {name: _counted(contender, spent[name]) for name, contender in contenders.items()}
        result = summarise(measure(counted, options.rounds, options.quiet))
        print(f"{'':<40}{'slices/s':>10}{'range':>16}{'seconds':>9}{'processor s':>13}{'ours / this':>13}{'range':>16}")
        for name, row in result.items():
            row["cpu"] = statistics.median(spent[name][1:])
            rate, ratio = (f"{row[key + '_least']:.4g} … {row[key + '_most']:.4g}" for key in ("rate", "ratio"))
            print(
                f"{name:<40}{row['rate']:>10.1f}{rate:>16}{slices / row['rate']:>9.1f}{row['cpu']:>13.1f}{row['ratio']:>13.2f}{ratio:>16}"
            )
        print(f"backend: {synth.backend}; median of {options.rounds} rounds of {slices} slices of {SIDE} x {SIDE}, in turn")
        many = _many(synth, manifest, folder, count, each)
        backend = synth.backend
    busy = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in many["busy"].items())
    print(f"{count} masks of {each} slices: wall {many['wall']:.1f} s; busy {busy} s; processor {many['cpu']:.1f} s on {cores()} cores = "
          f"{many['cpu'] / cores():.1f} s at least; wall / the larger bound {many['ratio']:.2f}")  # fmt: skip
    print(f"alone: import runtime {cold['import']:.2f} s, then {cold['first_slab']:.2f} s to the first slab of 16 slices")
    return {"suite": "stream", "backend": backend, "rounds": options.rounds, "slices": slices, "machine": machine(ROOT), "result": result,
            "many": many, "cold": cold}  # fmt: skip


def _counted(contender: Contender, spent: list[float]) -> Contender:
    """The contender, and the processor seconds of the whole process that each of its turns took: what other programs do tells less on them."""

    def turn() -> int:
        started = time.process_time()
        done = contender()
        spent.append(time.process_time() - started)
        return done

    return turn


def _ours(synth: Synthesizer, mask: Path, out: Path) -> int:
    shutil.rmtree(out, ignore_errors=True)
    (result,) = synth.stream([mask], out)
    assert result.error is None, result.error
    return result.slices


def _many(synth: Synthesizer, manifest: Manifest, folder: Path, count: int, slices: int) -> dict[str, Any]:
    masks = [write_mask(folder / "masks" / f"{n}.nii.gz", manifest, slices, seed=n) for n in range(count)]
    busy = {"read": 0.0, "paint": 0.0, "write": 0.0}
    wall, cpu = time.perf_counter(), time.process_time()
    for result in synth.stream(masks, folder / "many"):
        for stage, seconds in result.seconds.items():
            busy[stage] += seconds
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"masks": count, "slices": slices, "wall": wall, "busy": busy, "cpu": cpu, "ratio": wall / max(*busy.values(), cpu / cores())}


def _cold(model: Path, mask: Path, out: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", COLD, model, mask, out], cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[0]))


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


def _model(options: argparse.Namespace, folder: Path) -> tuple[Path, Any]:
    """The model folder and its network in PyTorch, if there is one."""
    import torch

    from export.graph import LabelsToIntensity
    from export.model_folder import describe_file
    from export.to_onnx import to_onnx
    from train.checkpoint import load_generator, load_run
    from train.generator import Generator, initialise

    if options.model is not None:
        if options.run is None:
            return options.model, None
        facts = load_run(options.run)
        return options.model, LabelsToIntensity(load_generator(options.run), len(facts.labels), facts.intensity)
    torch.manual_seed(0)
    net = Generator(len(MM_WHS), kind="edge", filters=32, depth=6, skips=True, textures=8)  # as train/configs/edge.json
    initialise([net])
    intensity = Intensity("HU", -1024, 1976)
    graph = LabelsToIntensity(net, len(MM_WHS), intensity)
    grid = GridPolicy((256, 256), (2 * SPACING[0], 2 * SPACING[1]), net.divisor)
    manifest = Manifest("edge", MM_WHS, grid, intensity, style=0, noise=True, files={})
    model = folder / "model"
    model.mkdir()
    to_onnx(graph, manifest.inputs, net.divisor, model / "model.onnx")
    whole = replace(manifest, files={"model.onnx": describe_file(model / "model.onnx", "onnx", "fp32")})
    write_json(model / "manifest.json", whole.to_json())
    return model, graph


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
            hu = graph(small, noise=noise).numpy().view("<i2")[..., 0].astype(np.float32)
            large = interpolate(torch.from_numpy(hu)[None], values.shape[1::-1], mode="bilinear")
            ct[:, :, k] = large[0, 0].round().numpy().T
    nibabel.save(nibabel.Nifti1Image(ct, image.affine), out)
    return int(values.shape[2])


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


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
        hu[k] = session.run(None, {"labels": labels[k : k + 1, None], "noise": noise})[0].view("<i2")[0, :, :, 0]
    painted = sitk.GetImageFromArray(hu)
    painted.CopyInformation(small)
    sitk.WriteImage(sitk.Resample(painted, image, sitk.Transform(), sitk.sitkLinear, manifest.intensity.low), str(out), True)
    return int(depth)


if __name__ == "__main__":
    sys.exit(run(main))
