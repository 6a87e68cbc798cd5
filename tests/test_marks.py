"""One rule recognises what mask2ct wrote: every format of the registry, and no file of others."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from samples import blobs, write_mask

from runtime.core.volume import CTSlab, Geometry, LabelVolume
from runtime.engines.fake import fake_manifest
from runtime.io.dicom.files import is_dicom, scan
from runtime.io.marks import dicom_written_by_mask2ct, written_by_mask2ct
from runtime.io.writers.registry import DEFAULT_OPTIONS, FORMATS, FormatOptions, OutputRecord

SHAPE = (4, 6, 5)
OUTPUTS = {name: (name, DEFAULT_OPTIONS) for name in FORMATS} | {
    "dicom enhanced": ("dicom", FormatOptions(enhanced=True)),
    "dicom labelmap": ("dicom", FormatOptions(segmentation="labelmap")),
}


def write_result(name: str, options: FormatOptions, output: Path, *, derived: bool) -> list[Path]:
    """The files of one result with its mask; the format must take each for mask2ct's."""
    mask = LabelVolume(blobs(SHAPE, values=(0, 1, 2)).astype(np.uint8), Geometry(np.eye(4)))
    manifest = replace(fake_manifest(), derived=derived)
    record = OutputRecord("case", 0, mask, manifest, "fake", "", seed=0, image_sha256="0" * 64)
    writer = FORMATS[name](options)
    writer.check(manifest, output)
    slabs = [CTSlab(np.zeros(SHAPE, np.int16), 0, 0)]
    paths = writer.write(output, record, slabs)
    assert all(writer.written_by_mask2ct(path) for path in paths)
    return [*files_below(paths)]


def files_below(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(path.iterdir()) if path.is_dir() else [path]


def replace_text(file: Path, old: bytes, new: bytes) -> None:
    """Replace a text in the unpacked bytes of a file by one of the same length."""
    content = file.read_bytes()
    is_packed = file.suffix == ".gz"
    plain = gzip.decompress(content) if is_packed else content
    assert old in plain and len(old) == len(new)
    plain = plain.replace(old, new)
    file.write_bytes(gzip.compress(plain) if is_packed else plain)


@pytest.mark.parametrize("derived", [False, True], ids=["synthetic", "derived"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_format_is_recognised(output: str, derived: bool, tmp_path: Path) -> None:
    files = write_result(*OUTPUTS[output], tmp_path, derived=derived)
    assert files
    for file in files:
        assert written_by_mask2ct(file), file
        if is_dicom(file):
            assert all(instance.written_by_mask2ct for instance in scan([file])), file


@pytest.mark.parametrize("derived", [False, True], ids=["synthetic", "derived"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_unmarked_files_belong_to_others(output: str, derived: bool, tmp_path: Path) -> None:
    name, options = OUTPUTS[output]
    for file in write_result(name, options, tmp_path, derived=derived):
        replace_text(file, b"NOT FOR DIAGNOSIS", b"FROM THE SCANNER ")
        assert not written_by_mask2ct(file), file
        if is_dicom(file):
            assert not any(instance.written_by_mask2ct for instance in scan([file])), file
    for path in FORMATS[name](options).files(tmp_path, "case", 0):
        assert not FORMATS[name](options).written_by_mask2ct(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_files_of_itk_belong_to_others(suffix: str, tmp_path: Path) -> None:
    assert not written_by_mask2ct(write_mask(tmp_path / f"case{suffix}"))


@pytest.mark.parametrize(
    ("attributes", "is_marked"),
    [
        # What version 0.1 states.
        ({"SyntheticData": "YES", "SeriesDescription": "SYNTHETIC CT - NOT FOR DIAGNOSIS"}, True),
        (
            {
                "SyntheticData": "YES",
                "SeriesDescription": "MASK OF A SYNTHETIC CT - NOT FOR DIAGNOSIS",
            },
            True,
        ),
        (
            {"Manufacturer": "mask2ct", "SeriesDescription": "DERIVED CT - NOT FOR DIAGNOSIS"},
            True,
        ),
        ({"Manufacturer": "Scanner", "SeriesDescription": "DERIVED CT - NOT FOR DIAGNOSIS"}, False),
        ({"SyntheticData": "NO", "SeriesDescription": "SYNTHETIC CT - NOT FOR DIAGNOSIS"}, False),
        ({"SeriesDescription": "SYNTHETIC CT - NOT FOR DIAGNOSIS"}, False),
        ({"SyntheticData": "YES"}, False),
        ({"Manufacturer": "mask2ct"}, False),
        ({}, False),
    ],
)
def test_dicom_attributes_decide(attributes: dict[str, str], is_marked: bool) -> None:
    ds = Dataset()
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    assert dicom_written_by_mask2ct(ds) == is_marked
