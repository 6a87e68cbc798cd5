"""The manifest for others: its JSON Schema, what `describe` prints, the model card."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from samples import write_mask

from export.model_card import model_card
from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import ModelError, printable
from runtime.core.manifest import Manifest
from runtime.engines.description import describe
from runtime.engines.fake import fake_manifest
from tools.docs_hooks import properties, schema_table


@pytest.fixture(scope="module")
def schema(root: Path) -> Any:
    schema = json.loads((root / "runtime" / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_exported_manifest_matches_schema(schema: Any, model: Path) -> None:
    schema.validate(json.loads((model / "manifest.json").read_text()))
    schema.validate(
        json.loads(
            json.dumps({**fake_manifest().to_json(), "training": {"weights_sha256": "0" * 64}})
        )
    )


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
def test_schema_refuses_bad_manifests(
    spoil: Callable[[Any], Any], schema: Any, model: Path
) -> None:
    data = json.loads((model / "manifest.json").read_text())
    spoil(data)
    assert not schema.is_valid(data)


def test_schema_and_manifest_keys_agree(schema: Any, model: Path) -> None:
    # Only a model with a context states these two (tests/test_tissue_classes.py).
    of_context = {"context", "noise_along_z"}
    assert set(schema.schema["properties"]) - of_context == set(Manifest.load(model).to_json())


def test_describe_prints_labels_files_proof(model: Path, command) -> None:
    done = command("-m", "runtime", "describe", model)
    assert done.returncode == 0, done.stderr
    manifest, lines = Manifest.load(model), done.stdout.splitlines()
    for name, file in manifest.files.items():
        assert any(name in line and file.sha256 in line and "verified" in line for line in lines)
    assert "500 left ventricle" in done.stdout and "license    not stated" in done.stdout
    numbers = manifest.parity["model.int8.onnx"]["openvino-int8"]["validation masks"]
    (row,) = [
        line.split()
        for line in lines
        if line.startswith("model.int8.onnx") and "openvino-int8" in line and "validation" in line
    ]
    assert (
        row[4] == str(numbers["slices"])
        and row[5] == f"{numbers['mean']:.3g}"
        and row[8] == f"{numbers['body_mean']:.3g}"
    )
    assert any(
        line.startswith("backend") and "openvino-int8: validated, by name only" in line
        for line in lines
    )


def test_describe_refuses_unreadable_model(model: Path, tmp_path: Path, command) -> None:
    shutil.copytree(model, tmp_path / "model")
    data = json.loads((model / "manifest.json").read_text())
    for key, value in (
        ("parity", {"model.onnx": {"onnx": {"validation masks": {}}}}),
        ("training", {"data": {"patients": {"train": 3}}}),
    ):
        (tmp_path / "model" / "manifest.json").write_text(json.dumps({**data, key: value}))
        done = command("-m", "runtime", "describe", tmp_path / "model")
        assert (
            done.returncode == 2
            and "cannot be used" in done.stderr
            and "Traceback" not in done.stderr
        )


def test_model_card_agrees_with_manifest(model: Path) -> None:
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


def test_model_card_states_license(model: Path) -> None:
    card = model_card(replace(Manifest.load(model), license="CC-BY-NC-4.0"))
    assert "## License\n\nCC-BY-NC-4.0\n" in card and "Not stated" not in card


def test_graph_labels_match_manifest(model: Path, tmp_path: Path) -> None:
    """A graph serves only the labels that it was exported for.

    A label that is added to, renamed or moved in the manifest: the file itself says what its
    channels mean.
    """
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
    data["labels"].append(
        {"index": 8, "name": "tumour", "value": 999, "aliases": [], "snomed": None}
    )
    return "labels"


def _swap(data: Any) -> str:
    one, other = data["labels"][1], data["labels"][3]
    one["value"], other["value"] = other["value"], one["value"]
    return "labels"


def _range(data: Any) -> str:
    data["intensity"]["high"] = 2048
    return "intensity"


def _grid(key: str, value: Any) -> Callable[[Any], None]:
    return lambda m: m["grid"].update({key: value})


def _file(key: str, value: Any) -> Callable[[Any], None]:
    return lambda m: m["files"].update({"model.onnx": {**FILE, key: value}})


FILE = {"kind": "onnx", "precision": "fp32", "bytes": 1, "sha256": "0" * 64, "facts": {}}
WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "huge canvas": (_grid("canvas", [1 << 40, 1 << 40]), "canvas"),
    "short canvas": (_grid("canvas", [64]), "canvas"),
    "canvas of an object": (_grid("canvas", {"0": 64, "1": 64}), "canvas"),
    "divisor that is no integer": (_grid("divisor", 32.5), "divisor"),
    "slices without end": (_grid("slices", 1e400), "slices"),
    "slices beyond count": (_grid("slices", 999999999), "slices"),
    "spacing without end": (
        lambda m: m["grid"].update(slices=3, slice_spacing=1e308),
        "slice_spacing",
    ),
    "spacing of almost nothing": (_grid("pixel_spacing", [1e-300, 1e-300]), "pixel_spacing"),
    "spacing that is no number": (_grid("pixel_spacing", [float("nan")] * 2), "pixel_spacing"),
    "spacing that is a word": (_grid("slice_spacing", "x"), "slice_spacing"),
    "true for a number": (_grid("divisor", True), "divisor"),
    "huge style": (lambda m: m.update(style=1 << 33), "style"),
    "noise that is a word": (lambda m: m.update(noise="no"), "noise"),
    "name that is a list": (lambda m: m.update(name=["a"]), "name"),
    "name without end": (lambda m: m.update(name="a" * 5000), "name"),
    "code that is an object": (lambda m: m["labels"][1].update(snomed={"a": 1}), "snomed"),
    "aliases that are a word": (lambda m: m["labels"][1].update(aliases="12"), "aliases"),
    "unit that is a list": (lambda m: m["intensity"].update(unit=["HU"]), "unit"),
    "size that is a word": (_file("bytes", "1"), "size"),
    "digest that is a number": (_file("sha256", 5), "sha256"),
    "facts that are a list": (_file("facts", [1]), "model.onnx"),
    "unknown fact of a file": (_file("extra", 1), "extra"),
    "file above the folder": (lambda m: m["files"].update({"..": FILE}), "file name"),
    "parity that is a list": (lambda m: m.update(parity={"model.onnx": ["onnx"]}), "parity"),
    "training that is a list": (lambda m: m.update(training=[1]), "training"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_manifest_value_is_named(name: str, tmp_path: Path) -> None:
    spoil, named = WRONG[name]
    data = copy.deepcopy(fake_manifest().to_json())
    spoil(data)
    (tmp_path / "manifest.json").write_text(json.dumps(data, default=vars))
    with pytest.raises(ModelError) as refused:
        Manifest.load(tmp_path)
    assert named in refused.value.fact and len(refused.value.fact) < 800


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "nested too deep"),
        ("[]", "is not an object"),
        ("", "Expecting value"),
        ('{"schema_version": ' + "9" * 5000 + "}", "digits"),
        ('{"name": "a", "name": "b"}', "'name' occurs twice"),
        (" " * (5 << 20) + "{}", "bytes"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_file_is_not_a_manifest(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=said):
        Manifest.load(tmp_path)


def as_export_writes_it() -> Any:
    """A manifest with all that `describe` reads."""
    data = json.loads(json.dumps(fake_manifest().to_json(), default=vars))
    numbers = {
        "slices": 8,
        "mean": 0.1,
        "p99_9": 1.0,
        "max": 2,
        "body_mean": 0.2,
        "organs": {"aorta": -0.5, "liver": None},
        "dssim": 1e-5,
    }
    data["parity"] = {
        "model.onnx": {
            "onnx": {"engine": "onnxruntime", "slices_per_second": 80.1, "random labels": numbers}
        }
    }
    organ = {
        "median": 139.0,
        "median_true": 116.0,
        "median_error": 23.0,
        "iqr": None,
        "iqr_true": 33.0,
        "texture_ratio": 1.2,
    }
    data["training"] = {
        "data": {"patients": {"train": 22, "test": 0}, "slices": {"train": 1056, "test": 0}},
        "metrics": {
            "body": {"mae": 110.1, "mae_mean_painting": 306.0},
            "organs": {"aorta": organ, "liver": {}},
        },
        "versions": {"torch": "2.13.0"},
        "step": 720,
        "commit": "2efb16d",
        "weights_sha256": "0" * 64,
    }
    data["export"] = {
        "onnx": "1.23.2",
        "int8": {"layers": 14, "of": 16, "floating": ["a", "b"], "calibrated_on": "training masks"},
    }
    return data


def keys_of(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value of an object, and to the first two of each list."""
    children = (
        [*node.items()]
        if isinstance(node, dict)
        else [*enumerate(node)][:2]
        if isinstance(node, list)
        else []
    )
    for key, child in children:
        yield (*path, key)
        yield from keys_of(child, (*path, key))


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


NO_VALUE = object()
CRAFTED = {
    "missing": NO_VALUE,
    "null": None,
    "true": True,
    "text": "x",
    "negative": -1,
    "fraction": 1.5,
    "huge": 10**400,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "empty list": [],
    "long list": [1] * 50,
    "empty object": {},
    "nested": nested(200),
}
PYTHON = re.compile(
    r"\w(Error|Exception)\b|\bNone|NoneType|'"
    r" object|attribute|subscript|indices|operand|__|codec|\b(dict|str|int|tuple|nan|inf)\b"
)


def refusal_of(folder: Path) -> ModelError | None:
    try:
        describe(Manifest.load(folder), folder)
    except ModelError as exc:
        return exc
    return None


@pytest.mark.parametrize("kind", CRAFTED)
def test_crafted_manifests_are_refused_plainly(kind: str, tmp_path: Path) -> None:
    """Each key with a value that export never writes: it is described, or one sentence names the
    key and what is expected.
    """
    refused = 0
    for path in keys_of(as_export_writes_it()):
        data = as_export_writes_it()
        *parents, last = path
        node = data
        for key in parents:
            node = node[key]
        if CRAFTED[kind] is NO_VALUE:
            del node[last]
        else:
            node[last] = CRAFTED[kind]
        (tmp_path / "manifest.json").write_text(json.dumps(data))
        error = refusal_of(tmp_path)
        if error is None:
            continue
        refused += 1
        names = [key for key in path if isinstance(key, str)][-2:]
        assert any(name in error.fact for name in names), (path, error.fact)
        assert "(expected " in error.fact and not PYTHON.search(error.fact), (path, error.fact)
        assert len(str(error)) < 1000 and error.exit_code == 2
    assert refused > 20


def test_describe_reads_exported_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(as_export_writes_it()))
    told = describe(Manifest.load(tmp_path), tmp_path)
    for words in (
        "22 patients, 1056 slices to train on",
        "720 steps, torch 2.13.0",
        "INT8: 14 of 16 layers",
        "in floating point: a, b",
    ):
        assert words in told


EVIL = "\x1b]0;pwned\x07\x1b[31mred\nfile       model.onnx verified\x9b2K\u202e"


def test_a_manifest_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = copy.deepcopy(fake_manifest(noise=False).to_json())
    data.update(
        name=EVIL,
        license=EVIL,
        training={"weights_sha256": EVIL, "versions": {EVIL: EVIL}},
        export={EVIL: EVIL},
    )
    data["labels"][1]["name"], data["intensity"]["unit"] = EVIL, EVIL
    data["training"]["metrics"] = {"organs": {EVIL: {"median": 1}}}
    model = tmp_path / "model"
    model.mkdir()
    (model / "manifest.json").write_text(json.dumps(data, default=vars))
    mask = write_mask(tmp_path / f"m{EVIL[:20]}.nii.gz")
    assert run(main, ["describe", str(model)]) == 0
    synthesis = [
        str(mask),
        "--model",
        str(model),
        "--backend",
        "fake",
        "--output",
        str(tmp_path / "out"),
    ]
    assert run(main, ["synth", *synthesis]) == 0
    assert run(main, ["synth", *synthesis, "--list"]) == 0
    assert run(main, ["labels", str(mask), "--model", str(model)]) == 0
    mask.write_bytes(b"damaged")
    assert run(main, ["synth", *synthesis]) == 1
    with pytest.raises(SystemExit):
        run(main, ["synth", "--x\x1b]0;pwned", *synthesis])
    said = "".join(capsys.readouterr())
    assert {c for c in said if not c.isprintable()} == {"\n"}
    assert "\\x1b]0;pwned" in said and not any(
        line.startswith("file ") for line in said.splitlines()
    )


def test_letters_of_every_script_show() -> None:
    for text in ("Herz — größer", "心臓　右", "قلب", "a b"):
        assert printable(text) == text
    assert printable("a\tb\r\n\x7f\udcff") == "a\\tb\\r\\n\\x7f\\udcff"


def test_manifest_page_explains_every_key(root: Path) -> None:
    """The reference page is made from the schema: each key is in it, with what it means."""
    path = root / "runtime" / "manifest.schema.json"
    schema = json.loads(path.read_text())
    keys = dict(properties(schema, schema["$defs"]))
    assert {"files.*.sha256", "labels[].index", "parity.*.*.engine", "export.int8-gpu.of"} <= set(
        keys
    )
    assert [key for key, part in keys.items() if not part.get("description")] == []
    page = (root / "docs" / "reference" / "manifest.md").read_text()
    assert "{{ schema: runtime/manifest.schema.json }}" in page
    table = schema_table(path)
    assert all(f"| `{key}` |" in table for key in keys)
