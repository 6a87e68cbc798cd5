"""Mutated masks through the whole command, each in a process of its own: `python tests/fuzz.py
FORMAT COUNT [SEED]`.

Prints one JSON line per file that did worse than to work or to be refused: a signal (SIGXCPU: more
than 10 s of work), more memory than its size justifies, a traceback, or something half-written;
then a line with the counts. The same FORMAT, COUNT and SEED give the same files; a file that failed
is kept in the folder it names.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np
import SimpleITK as sitk
from samples import blobs, image, write_fake_model, write_mask

from runtime.__main__ import main
from runtime.batch.audit_log import AUDIT
from runtime.batch.completion_log import JOURNAL
from runtime.core.console import run
from runtime.engines.fake import fake_manifest

SECONDS = 10
SPARE = 256 << 20  # bytes a process may take besides PER_BYTE for each byte of its files
PER_BYTE = 64
NUMBERS = [
    b"0",
    b"-1",
    b"1",
    b"2",
    b"255",
    b"65535",
    b"99999999999999999999",
    b"nan",
    b"inf",
    b"1e308",
    b"-0.0",
    b"",
    b" ",
    b"\\",
    b"../x",
]
WORDS = [
    bytes(4),
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\x01\x00",
    b"\xff\x7f",
    b"\x00\x00\xc0\x7f",
    bytes(8),
    b"\xff" * 8,
]


def mutated(data: bytes, rng: random.Random, head: int) -> bytes:
    """One to four changes, most of them within the first `head` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(max(1, min(len(out), head if rng.random() < 0.85 else len(out))))
        kind = rng.randrange(6)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            word = rng.choice(WORDS)
            out[at : at + len(word)] = word
        elif kind == 2:
            numbers = [n for n in range(at, min(len(out), at + 200)) if 48 <= out[n] <= 57]
            if numbers:
                end = next(
                    (n for n in range(numbers[0], len(out)) if out[n] not in b"0123456789.eE+-"),
                    len(out),
                )
                out[numbers[0] : end] = rng.choice(NUMBERS)
        elif kind == 3:
            del out[at : at + rng.choice((1, 2, 4, 64))]
        elif kind == 4:
            out[at:at] = out[at : at + rng.choice((1, 4, 32))] or b"\0"
        elif rng.random() < 0.3:
            del out[rng.randrange(len(out)) :]
    return bytes(out)


def _volume(suffix: str, head: int, packed: bool = False) -> Callable[[Path], tuple[Path, int]]:
    def make(folder: Path) -> tuple[Path, int]:
        sitk.WriteImage(
            image(blobs((5, 12, 14))), str(folder / f"m{suffix}"), useCompression=packed
        )
        return folder / f"m{suffix}", head

    return make


def _slicer(folder: Path) -> tuple[Path, int]:
    from test_labels import slicer

    layers = np.zeros((2, 4, 10, 12), np.uint8)
    layers[0, 1, 2:6, 2:6], layers[1, 2, 4:8, 4:8] = 1, 2
    return (
        slicer(
            folder / "m.seg.nrrd",
            layers,
            [("Left Ventricle", 1, 0, "87878005"), ("left atrium", 2, 1, "82471001")],
        ),
        900,
    )


def _seg(kind: str, syntax: str) -> Callable[[Path], tuple[Path, int]]:
    def make(folder: Path) -> tuple[Path, int]:
        from dicom_masks import segmentation, slices

        values = (blobs((4, 12, 14), (0, 1, 2)) % 3).astype(np.uint8)
        segmentation(
            folder / "m.dcm",
            slices(values),
            values,
            [("a", "87878005"), ("b", "82471001")],
            kind,
            transfer_syntax_uid=syntax,
        )
        return folder / "m.dcm", 12000

    return make


def _series(folder: Path) -> tuple[Path, int]:
    from dicom_masks import save, slices

    save(folder, slices(blobs((4, 12, 14))), "m")
    return sorted(folder.iterdir())[0], 1400


def _jpeg2000(folder: Path) -> tuple[Path, int]:
    from dicom_masks import save, slices
    from PIL import Image
    from pydicom.encaps import encapsulate

    made = slices(blobs((3, 24, 28), (0, 205)).astype(np.uint8))
    for ds in made:
        code = io.BytesIO()
        Image.fromarray(ds.pixel_array).save(code, "JPEG2000", irreversible=False, no_jp2=True)
        ds.PixelData, ds.file_meta.TransferSyntaxUID = (
            encapsulate([code.getvalue()]),
            "1.2.840.10008.1.2.4.90",
        )
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    save(folder, made, "m")
    return sorted(folder.iterdir())[0], 2000


def _rtstruct(folder: Path) -> tuple[Path, int]:
    from test_rtstruct import drawn

    drawn(folder)
    return folder / "rs" / "Doe.dcm", 40000


def _zip(folder: Path) -> tuple[Path, int]:
    write_mask(folder / "m.nii.gz", blobs((5, 12, 14)))
    with zipfile.ZipFile(folder / "m.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.write(folder / "m.nii.gz", "m.nii.gz")
    (folder / "m.nii.gz").unlink()
    return folder / "m.zip", 4000


FORMATS: dict[str, Callable[[Path], tuple[Path, int]]] = {
    "nii": _volume(".nii", 352),
    "nii.gz": _volume(".nii.gz", 352),
    "nrrd": _volume(".nrrd", 300),
    "nrrd-gzip": _volume(".nrrd", 300, True),
    "mha": _volume(".mha", 300),
    "mha-zlib": _volume(".mha", 300, True),
    "mhd": _volume(".mhd", 400),
    "seg.nrrd": _slicer,
    "seg": _seg("BINARY", "1.2.840.10008.1.2.1"),
    "labelmap": _seg("LABELMAP", "1.2.840.10008.1.2.5"),
    "jpeg-ls": _seg("LABELMAP", "1.2.840.10008.1.2.4.80"),
    "jpeg2000": _jpeg2000,
    "rtstruct": _rtstruct,
    "series": _series,
    "zip": _zip,
}
IN_A_FOLDER = ("series", "jpeg2000", "rtstruct")


def attempt(target: Path, given: Path, model: Path, folder: Path) -> str:
    """Run the command on `given` in a child; what went wrong, or "0", "1" or "2": its exit code."""
    out, log = folder / "out", folder / "log"
    size = sum(
        p.stat().st_size for p in (given.rglob("*") if given.is_dir() else [target]) if p.is_file()
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    child = os.fork()
    if child == 0:
        code = 99
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            room = SPARE + PER_BYTE * size
            resource.setrlimit(resource.RLIMIT_AS, (pages + 4 * room, pages + 4 * room))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.alarm(6 * SECONDS)  # on a busy machine a second of work takes longer
            text = io.StringIO()
            with redirect_stderr(text), redirect_stdout(text):
                code = run(
                    main,
                    [
                        "synth",
                        str(given),
                        "--model",
                        str(model),
                        "--backend",
                        "fake",
                        "--output",
                        str(out),
                        "--quiet",
                    ],
                )
        except BaseException:
            import traceback

            text = io.StringIO(traceback.format_exc())
        log.write_text(text.getvalue()[-3000:])
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    written = (
        [p for p in out.rglob("*") if p.is_file() and p.name not in (JOURNAL, AUDIT)]
        if out.exists()
        else []
    )
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    if (usage.ru_maxrss << 10) - before > SPARE + PER_BYTE * size:
        return f"memory {usage.ru_maxrss >> 10} MiB of {before >> 20} before"
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1, 2) or "Traceback" in log.read_text():
        return f"exit {code}: {log.read_text()[-500:]}"
    if any(".mask2ct-part-" in p.name for p in written) or (code == 2 and written):
        return f"partial output {written}"
    for path in written:
        try:
            sitk.ReadImage(str(path))
        except RuntimeError:
            return f"unreadable output {path.name}"
    return str(code)


def fuzz(kind: str, count: int, seed: int) -> tuple[Counter[str], list[dict[str, object]]]:
    outcomes: Counter[str] = Counter()
    failures: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as made:
        seeds = Path(made) / "seed"
        seeds.mkdir()
        model = write_fake_model(Path(made) / "model", fake_manifest(noise=False))
        target, head = FORMATS[kind](seeds)
        whole = target.read_bytes()
        good = seeds if kind in IN_A_FOLDER else target
        with redirect_stdout(
            io.StringIO()
        ):  # in this process, so that no child has to import again
            run(
                main,
                [
                    "synth",
                    str(good),
                    "--model",
                    str(model),
                    "--backend",
                    "fake",
                    "--output",
                    str(Path(made) / "first"),
                    "--quiet",
                ],
            )
        for n in range(count):
            rng = random.Random(f"{kind} {seed} {n}")
            folder = Path(made) / str(n)
            shutil.copytree(seeds, folder / "in")
            file = folder / "in" / target.relative_to(seeds)
            if (
                kind == "nii.gz" and rng.random() < 0.8
            ):  # what the compression holds, not its own bytes
                file.write_bytes(gzip.compress(mutated(gzip.decompress(whole), rng, head), 1))
            else:
                file.write_bytes(mutated(whole, rng, head))
            given = folder / "in" if kind in IN_A_FOLDER else file
            outcome = attempt(file, given, model, folder)
            outcomes[outcome if outcome in "012" else "failed"] += 1
            if outcome not in "012":
                kept = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-{n}-"))
                shutil.copytree(folder / "in", kept / "in")
                failures.append(
                    {
                        "format": kind,
                        "number": n,
                        "seed": seed,
                        "outcome": outcome,
                        "kept": str(kept),
                    }
                )
            shutil.rmtree(folder)
    return outcomes, failures


if __name__ == "__main__":
    found, bad = fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    for failure in bad:
        print(json.dumps(failure))
    print(json.dumps(found))
    sys.exit(bool(bad))
