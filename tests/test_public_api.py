"""The public classes as an engineer meets them: arguments, progress, stopping, pickling, bytes."""

from __future__ import annotations

import inspect
import io
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import blobs, image, write_mask

import runtime
from runtime import ModelError, Models, ProgressEvent, Synthesizer
from runtime.batch.plan import Plan
from runtime.core.console import Parser
from runtime.engines.fake import FakeEngine, fake_manifest


def open_fake(folder: Any) -> Synthesizer:
    return Synthesizer.open(folder, backend="fake")


def masks_in(folder: Path, count: int = 2) -> list[Path]:
    return [write_mask(folder / f"m{n}.nii.gz", blobs(seed=n)) for n in range(count)]


def zipped(folder: Path, within: str = "", **changes: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.writestr(within + file.name, changes.pop(file.stem, file.read_bytes()))
    return packed.getvalue()


def public_callables() -> dict[str, Callable[..., Any]]:
    named: dict[str, Callable[..., Any]] = {}
    for name in runtime.__all__:
        thing = getattr(runtime, name)
        if isinstance(thing, type) and issubclass(thing, Exception):
            continue
        named[name] = thing
        for attribute, value in inspect.getmembers(thing, callable):
            if not attribute.startswith("_") or attribute in ("__init__", "__call__"):
                named[f"{name}.{attribute}"] = value
    return named


def test_public_arguments_are_explicit() -> None:
    for name, thing in public_callables().items():
        try:
            signature = inspect.signature(thing)
        except ValueError:  # of the C implementation
            continue
        if getattr(thing, "__module__", "").startswith("runtime"):
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_defaults_agree_everywhere() -> None:
    """`stream`, the plan and the command line have the same options with the same defaults."""
    from runtime.cli import synth

    stream = inspect.signature(Synthesizer.stream).parameters
    commands = Parser("mask2ct").add_subparsers()
    synth.add(commands)
    command = commands.choices["synth"].parse_args(["m", "--output", "o"])
    for field in fields(Plan):
        if field.name == "output":
            continue
        stated = stream[field.name].default
        if field.name in ("ranges", "options"):
            assert stated is None  # the plan's own
            continue
        assert field.default is not MISSING and stated == field.default, field.name
        if field.name != "replace":  # the command always may
            assert getattr(command, field.name) == field.default, field.name
    default = Plan(Path("o"))
    for name in ("deform", "rotate", "scale", "mirror"):
        assert getattr(command, name) == getattr(default.ranges, name)
    for field in fields(default.options):
        assert getattr(command, field.name) == getattr(default.options, field.name)


def test_unknown_argument_is_refused(fake_model: Path, tmp_path: Path) -> None:
    with open_fake(fake_model) as synth, pytest.raises(TypeError, match="varients"):
        synth.stream([tmp_path], tmp_path / "out", varients=3)  # type: ignore[call-arg]


def test_wrong_type_gets_hint(fake_model: Path) -> None:
    array = np.zeros((2, 8, 8), np.uint16)
    with open_fake(fake_model) as synth:
        with pytest.raises(TypeError, match=r"numpy array.*synth\.volume\(array, Geometry"):
            synth(array)
        with pytest.raises(TypeError, match=r"numpy array.*synth\.volume\(array, Geometry"):
            synth.synthesize(array)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"synth\(image\)"):
            next(synth.slabs(image(array)))
        with pytest.raises(TypeError, match=r"synth\.stream"):
            synth(Path("mask.nii.gz"))


def test_progress_tells_case_and_total(fake_model: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no volume")
    paths = [*masks_in(tmp_path), broken]
    with open_fake(fake_model) as synth:
        list(synth.stream(paths, tmp_path / "out", variants=2, on_progress=events.append))
        assert {event.total for event in events} == {6}
        ends = [event for event in events if event.stage != "synthesizing"]
        assert [event.done for event in ends][-1] == 6
        assert {event.case for event in ends if event.stage == "failed"} == {"broken"}
        slices = [e for e in events if e.stage == "synthesizing" and e.case == "m0"]
        assert slices and {event.slices_total for event in slices} == {6}
        kept: list[ProgressEvent] = []
        run = synth.stream(paths[:1], tmp_path / "out", variants=2, resume=True)
        assert all(result.skipped for result in run)
        run = synth.stream(
            paths[:1], tmp_path / "out", variants=2, resume=True, on_progress=kept.append
        )
        list(run)
        assert [(event.stage, event.done) for event in kept] == [("kept", 1), ("kept", 2)]


class Stop(Exception):
    pass


def test_stopping_leaves_whole_results(fake_model: Path, tmp_path: Path) -> None:
    """In the middle of a CT: the complete results stay, and a resumed run makes the others."""
    paths, out = masks_in(tmp_path, 3), tmp_path / "out"

    def stop(event: ProgressEvent) -> None:
        if event.case == "m1":
            raise Stop

    with open_fake(fake_model) as synth:
        with pytest.raises(Stop):
            list(synth.stream(paths, out, on_progress=stop))
        names = {file.name for file in out.iterdir() if not file.name.startswith(".")}
        assert names <= {"m0_ct.nii.gz", "m0_mask.nii.gz"}
        assert not [file for file in out.rglob("*") if "part" in file.name]
        results = [*synth.stream(paths, out, resume=True)]
        assert sorted(result.case for result in results) == ["m0", "m1", "m2"]
        assert all(result.error is None for result in results)


def test_pickled_model_opens_again(fake_model: Path, tmp_path: Path) -> None:
    mask = image(blobs())
    with open_fake(fake_model) as synth:
        expected = runtime_bytes(synth, mask)
        content = pickle.dumps(synth)
    with pickle.loads(content) as again:
        assert type(again) is Synthesizer and runtime_bytes(again, mask) == expected
    code = (
        "import pickle, sys; s = pickle.loads(sys.stdin.buffer.read());"
        " print(type(s).__name__, s.engine); s.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(runtime.__file__).parent.parent,
        input=content,
        capture_output=True,
        check=False,
    )
    assert done.stdout.startswith(b"Synthesizer fake"), done.stderr


def runtime_bytes(synth: Synthesizer, mask: Any) -> bytes:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(synth(mask, seed=3)).tobytes()


def test_changed_folder_is_not_unpickled(fake_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in fake_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with open_fake(folder) as synth:
        content = pickle.dumps(synth)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest + "\n")
    with pytest.raises(ModelError, match="another model"):
        pickle.loads(content)


def test_unpicklable_model_says_why(fake_model: Path) -> None:
    manifest = fake_manifest()
    with pytest.raises(TypeError, match="not opened from a model folder"):
        pickle.dumps(Synthesizer(manifest, FakeEngine(manifest)))
    with Models.open([fake_model], backend="fake") as models:
        with pytest.raises(TypeError, match="Models cannot be pickled"):
            pickle.dumps(models)
        with pytest.raises(TypeError, match="shares its memory"):
            pickle.dumps(models[models.names[0]])
    closed = open_fake(fake_model)
    closed.close()
    with pytest.raises(TypeError, match="it is closed"):
        pickle.dumps(closed)


@pytest.mark.parametrize("within", ["", "model/"])
def test_model_opens_from_bytes(within: str, fake_model: Path) -> None:
    mask = image(blobs())
    with open_fake(fake_model) as synth:
        expected = runtime_bytes(synth, mask)
    content = zipped(fake_model, within)
    for source in (content, io.BytesIO(content)):
        with open_fake(source) as synth:
            assert runtime_bytes(synth, mask) == expected
            with pytest.raises(TypeError, match="given as bytes"):
                pickle.dumps(synth)


def test_unpacked_model_is_removed(fake_model: Path) -> None:
    from runtime.core.workspace import private_folder

    with open_fake(zipped(fake_model)):
        assert [*private_folder().glob("model-*")]
    assert not [*private_folder().glob("model-*")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no zip", "cannot be read as a zip"),
        (b"", "cannot be read as a zip"),
        (None, "0 files called manifest.json"),
    ],
)
def test_bytes_without_model_are_refused(content: bytes | None, reason: str) -> None:
    if content is None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("../outside.txt", "text")
        content = packed.getvalue()
    with pytest.raises(ModelError, match=reason):
        open_fake(content)


def test_huge_manifest_is_not_unpacked(fake_model: Path) -> None:
    with pytest.raises(ModelError, match="more than"):
        open_fake(zipped(fake_model, manifest=bytes(5 << 20)))


def test_page_lists_public_names(root: Path) -> None:
    page = (root / "docs/reference/public.md").read_text()
    table = page.partition("## Names to import")[2].partition("## Other doors")[0]
    stated = re.findall(r"`(\w+)`", "\n".join(line for line in table.splitlines() if "|" in line))
    assert sorted(stated) == sorted(runtime.__all__)
