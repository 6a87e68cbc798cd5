"""The manifest for others: its JSON Schema, what `describe` prints, the model card."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from export.model_card import model_card
from runtime.contract import Manifest
from runtime.engines.fake import fake_manifest
from runtime.errors import ModelError


@pytest.fixture(scope="module")
def schema(root: Path) -> Any:
    schema = json.loads((root / "runtime" / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_what_export_writes_is_what_the_schema_says(schema: Any, model: Path) -> None:
    schema.validate(json.loads((model / "manifest.json").read_text()))
    schema.validate(json.loads(json.dumps({**fake_manifest().to_json(), "training": {"weights_sha256": "0" * 64}})))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.update(schema_version=1),
        lambda m: m.pop("labels"),
        lambda m: m.update(surprise=1),
        lambda m: m["files"]["model.onnx"].update(sha256="short"),
        lambda m: m["files"].update({"../model.onnx": m["files"]["model.onnx"]}),
        lambda m: m["parity"]["model.onnx"]["onnx"].pop("random labels"),
        lambda m: m["parity"]["model.onnx"]["onnx"]["validation masks"].update(max=-1),
        lambda m: m["grid"].update(canvas=[64]),
        lambda m: m["inputs"][0].update(dtype="int64"),
        lambda m: m["labels"].__setitem__(0, {"name": "background"}),
    ],
)
def test_the_schema_refuses_what_is_no_manifest(spoil: Callable[[Any], Any], schema: Any, model: Path) -> None:
    data = json.loads((model / "manifest.json").read_text())
    spoil(data)
    assert not schema.is_valid(data)


def test_every_key_is_in_both(schema: Any, model: Path) -> None:
    assert set(schema.schema["properties"]) == set(Manifest.load(model).to_json())


def test_describe_prints_labels_files_and_proof(model: Path, command) -> None:
    done = command("-m", "runtime", "describe", model)
    assert done.returncode == 0, done.stderr
    manifest, lines = Manifest.load(model), done.stdout.splitlines()
    for name, file in manifest.files.items():
        assert any(name in line and file.sha256 in line and "verified" in line for line in lines)
    assert "500 left ventricle" in done.stdout and "license    not stated" in done.stdout
    numbers = manifest.parity["model.int8.onnx"]["openvino-int8"]["validation masks"]
    (row,) = [line.split() for line in lines if line.startswith("model.int8.onnx") and "openvino-int8" in line and "validation" in line]
    assert row[4] == str(numbers["slices"]) and row[5] == f"{numbers['mean']:.3g}" and row[8] == f"{numbers['body_mean']:.3g}"
    assert any(line.startswith("backend") and "openvino-int8: proven, by name only" in line for line in lines)


def test_describe_refuses_what_it_cannot_read(model: Path, tmp_path: Path, command) -> None:
    shutil.copytree(model, tmp_path / "model")
    data = json.loads((model / "manifest.json").read_text())
    for key, value in (("parity", {"model.onnx": {"onnx": {"validation masks": {}}}}), ("training", {"data": {"patients": {"train": 3}}})):
        (tmp_path / "model" / "manifest.json").write_text(json.dumps({**data, key: value}))
        done = command("-m", "runtime", "describe", tmp_path / "model")
        assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_the_model_card_says_what_the_manifest_says(model: Path) -> None:
    manifest = Manifest.load(model)
    card = (model / "MODEL_CARD.md").read_text()
    assert card == model_card(manifest)
    for text in (
        "Never for diagnosis",
        "Not stated. Whoever trained this model must fill this in",
        "| 500 | left ventricle |",
        "slices to train on",
    ):
        assert text in card, text
    assert all(f"`{file.sha256}`" in card for file in manifest.files.values())
    mean = manifest.parity["model.fp16.onnx"]["onnx-fp16"]["validation masks"]["mean"]
    assert f"| {mean:.3g} |" in card


def test_a_license_that_is_stated_is_in_the_card(model: Path) -> None:
    card = model_card(replace(Manifest.load(model), license="CC-BY-NC-4.0"))
    assert "## License\n\nCC-BY-NC-4.0\n" in card and "Not stated" not in card


def test_a_graph_serves_only_the_labels_it_was_exported_for(model: Path, tmp_path: Path) -> None:
    """A label that is added to, renamed or moved in the manifest: the file itself says what its channels mean."""
    from runtime.engines.registry import open_engine

    shutil.copytree(model, tmp_path / "model")
    whole = json.loads((model / "manifest.json").read_text())
    for backend in ("onnx", "openvino"):
        for change in (_add, _swap, _range):
            data = copy.deepcopy(whole)
            what = change(data)
            with pytest.raises(ModelError, match=rf"model\.onnx was exported for other {what}"):
                open_engine(backend, Manifest.from_json(data), tmp_path / "model")


def _add(data: Any) -> str:
    data["labels"].append({"index": 8, "name": "tumour", "value": 999, "aliases": [], "snomed": None})
    return "labels"


def _swap(data: Any) -> str:
    one, other = data["labels"][1], data["labels"][3]
    one["value"], other["value"] = other["value"], one["value"]
    return "labels"


def _range(data: Any) -> str:
    data["intensity"]["high"] = 2048
    return "intensity"
