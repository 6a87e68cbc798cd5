"""Several models at once: which one a mask is for, and one cap on the memory of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_masks import save, slices
from fake_cuda import install
from hand_made import write_model
from samples import blobs, results, synth, write_fake_model, write_mask

from runtime import InputError, Models, Synthesizer, UsageError
from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import MemoryCapExceeded
from runtime.core.labels import MM_WHS
from runtime.core.manifest import Label, LabelTable
from runtime.core.volume import Geometry, LabelVolume
from runtime.engines.base import EngineOptions, Inputs
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.engines.memory import Stream
from runtime.io.case_finding import find_cases

ABDOMEN = LabelTable(
    (
        Label("background", 0),
        Label("liver", 6, snomed="10200004"),
        Label("spleen", 1),
        Label("left ventricle", 500),
    )
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A heart model with noise and an abdomen model without; both know 0 and 500."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "heart": write_fake_model(folder / "heart", fake_manifest(MM_WHS)),
        "abdomen": write_fake_model(folder / "abdomen", fake_manifest(ABDOMEN, noise=False)),
    }


def both(folders: dict[str, Path], **options: Any) -> Models:
    return Models.open([*folders.values()], backend="fake", **options)


def mask(folder: Path, name: str, *values: int) -> Path:
    return write_mask(folder / f"{name}.nii.gz", blobs((6, 20, 24), values))


def choice(models: Models, path: Path) -> tuple[str, str]:
    (case,) = find_cases([path])
    name, reason = models.decide(case)
    assert models.choose(case) == (name, models[name])
    return name, reason


def test_labels_choose_the_model(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mask is synthesized by the model that knows its labels."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, values in {
        "a": (0, 205, 500),
        "b": (0, 6, 1),
        "c": (0, 420, 820),
        "unknown": (0, 3),
        "either": (0, 500),
    }.items():
        mask(masks, name, *values)
    out, report = tmp_path / "out", tmp_path / "report.json"
    line = [
        "synth",
        str(masks),
        "--output",
        str(out),
        "--backend",
        "fake",
        "--report",
        str(report),
        "--seed",
        "3",
    ]
    assert run(main, [*line, *(f"--model={folder}" for folder in folders.values())]) == 1
    said = capsys.readouterr().err
    assert (
        "a.nii.gz: heart (its labels: 0, 205, 500)" in said
        and "b.nii.gz: abdomen (its labels: 0, 1, 6)" in said
    )
    assert (
        "unknown.nii.gz fits no model: heart does not know 3; abdomen does not know 3" in said
        and "--use NAME" in said
    )
    assert "either.nii.gz fits the models heart, abdomen" in said
    for name, those in {"heart": ("a", "c"), "abdomen": ("b",)}.items():
        assert (
            synth(
                folders[name],
                tmp_path / "alone",
                *(masks / f"{one}.nii.gz" for one in those),
                "--seed",
                "3",
            )
            == 0
        )
    assert results(out) == results(tmp_path / "alone") and len(results(out)) == 3
    told = json.loads(report.read_text())
    assert {case["case"]: case["model"] for case in told["cases"]} == {
        "a": "heart",
        "b": "abdomen",
        "c": "heart",
        "unknown": "",
        "either": "",
    }
    assert [*told["models"]] == ["heart", "abdomen"] and told["models"]["heart"]["model"] == "fake"


def test_label_map_serves_several_models(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One label map serves several models, and each uses its own entries."""
    masks, maps = [mask(tmp_path, "a", 0, 51, 52), mask(tmp_path, "b", 0, 5)], tmp_path / "map.json"
    maps.write_text(
        json.dumps(
            {"0": "background", "51": "left ventricle", "52": "ascending aorta", "5": "liver"}
        )
    )
    line = [
        "synth",
        *map(str, masks),
        "--output",
        str(tmp_path / "out"),
        "--backend",
        "fake",
        "--labels",
        str(maps),
    ]
    line += [f"--model={folder}" for folder in folders.values()]
    assert run(main, line) == 0
    said = capsys.readouterr().err
    assert (
        "a.nii.gz: heart (its labels: 0, 51, 52)" in said
        and "b.nii.gz: abdomen (its labels: 0, 5)" in said
    )
    maps.write_text(json.dumps({"5": "liver", "7": "pancreas"}))
    assert run(main, line) == 2 and "'pancreas'" in capsys.readouterr().err
    maps.write_text(json.dumps({"5": ["liver"]}))
    assert run(main, line) == 2


def test_mask_name_chooses_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of several models that fit, the one that the name of the mask speaks of is chosen."""
    with both(folders) as models:
        assert choice(models, mask(tmp_path, "Patient-7_HEART", 0, 500)) == (
            "heart",
            "its labels and its name or description",
        )
        with pytest.raises(InputError, match="fits the models heart, abdomen"):
            choice(models, mask(tmp_path, "sweetheart", 0, 500))
        with pytest.raises(InputError, match="fits the models"):
            choice(models, mask(tmp_path, "heart and abdomen", 0, 500))
        with pytest.raises(
            InputError, match="fits no model"
        ):  # a name does not teach a model labels
            choice(models, mask(tmp_path, "heart", 0, 6, 820))


def test_series_description_chooses_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """The description of a series chooses the model and is not repeated."""
    series = slices(blobs((6, 20, 24), (0, 500)), SeriesDescription="Doe abdomen 2019")
    with both(folders) as models:
        assert choice(models, save(tmp_path / "series", series)) == (
            "abdomen",
            "its labels and its name or description",
        )


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"case": "la_*", "model": "abdomen"}, "abdomen"),
        ({"labels": ["left VENTRICLE"], "model": "abdomen"}, "abdomen"),
        ({"labels": [500], "case": "*", "model": "abdomen"}, "abdomen"),
        ({"labels": [500, 205], "model": "abdomen"}, "heart"),
        ({"series": "*chest*", "model": "abdomen"}, "heart"),
        ({"model": "abdomen"}, "abdomen"),
    ],
)
def test_first_matching_rule_decides(
    rule: dict[str, Any], name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([rule, {"case": "LA*", "model": "heart"}]))
    with both(folders, rules=rules) as models:
        assert choice(models, mask(tmp_path, "LA_7", 0, 500)) == (
            name,
            f"rule {1 + (name == 'heart')}",
        )


def test_rule_matches_series_description(folders: dict[str, Path], tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"series": "*Thorax*", "model": "heart"}]))
    series = save(
        tmp_path / "series",
        slices(blobs((6, 20, 24), (0, 500)), SeriesDescription="CT THORAX labels"),
    )
    with both(folders, rules=rules) as models:
        assert choice(models, series) == ("heart", "rule 1")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '"heart"',
        "[7]",
        '[{"case": "*"}]',
        '[{"model": "liver"}]',
        '[{"model": "heart", "lables": [1]}]',
        '[{"model": "heart", "labels": 5}]',
        '[{"model": "heart", "case": 5}]',
    ],
)
def test_bad_model_rules_are_refused(text: str, folders: dict[str, Path], tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(text)
    with pytest.raises(UsageError) as caught:
        both(folders, rules=rules)
    assert caught.value.file == rules and "models: heart, abdomen" in caught.value.expected


def test_rules_for_one_model_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Rules for a single model are refused, because they would have no effect.

    Who gives them has forgotten a model, or a rule's: a mask that no rule is for would be
    synthesized all the same.
    """
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"case": "LA*", "model": "heart"}]))
    with pytest.raises(
        UsageError, match="--rules choose between models, and heart is the only one"
    ):
        Models.open([folders["heart"]], backend="fake", rules=rules)


def test_single_model_takes_every_mask(folders: dict[str, Path], tmp_path: Path) -> None:
    """A single model takes every mask, and so does the model that the caller names."""
    path = mask(tmp_path, "abdomen", 0, 6)
    with Models.open([folders["heart"]], backend="fake") as models:
        assert choice(models, path) == ("heart", "the only model")
    with both(folders, use="heart") as models:
        assert choice(models, path) == ("heart", "asked for")
    with pytest.raises(UsageError, match="there is no model 'liver'"):
        both(folders, use="liver")


def test_model_names_from_folders_or_options(folders: dict[str, Path], tmp_path: Path) -> None:
    odd = write_fake_model(tmp_path / "a=b", fake_manifest())
    with Models.open(
        [folders["heart"], f"second={folders['heart']}", odd], backend="fake"
    ) as models:
        assert (
            models.names == ("heart", "second", "a=b")
            and len({id(models[name]) for name in models}) == 3
        )
    with pytest.raises(UsageError, match="two models are called heart"):
        Models.open([folders["heart"], f"heart={folders['abdomen']}"], backend="fake")
    with pytest.raises(UsageError, match="does not exist"):
        Models.open([folders["heart"], tmp_path / "none"], backend="fake")


def volume(seed: int, depth: int = 9) -> LabelVolume:
    labels = np.random.default_rng(seed).integers(0, 4, (depth, 30, 30)).astype(np.uint8)
    return LabelVolume(labels, Geometry(np.diag([3.0, 3.0, 3.0, 1.0])))


def held(models: Models) -> dict[str, int]:
    return {
        name: sum(stats.held for stats in kinds.values()) for name, kinds in models.memory().items()
    }


@pytest.mark.parametrize("room", ["for one", "for both"])
def test_least_recently_used_model_closes(room: str, folders: dict[str, Path]) -> None:
    """A model that does not fit beside the others replaces the one that was not used for longest.

    Three models in turn, under a cap that two of them would pass, and under one that is enough for
    all.
    """
    order = ["heart", "abdomen", "third", "heart", "heart", "third", "abdomen"]
    opened = [*folders.values(), f"third={folders['heart']}"]
    with Models.open(opened, backend="fake", workers=1) as models:
        whole = [models[name].synthesize(volume(n)) for n, name in enumerate(order)]
        need = held(models)
    assert need["heart"] > need["abdomen"] > 0  # one has noise
    cap = need["heart"] + (1 << 10 if room == "for one" else need["heart"] + need["abdomen"])
    with Models.open(opened, backend="fake", workers=1, max_memory=cap) as models:
        for n, name in enumerate(order):
            assert np.array_equal(models[name].synthesize(volume(n)), whole[n])
            now = held(models)
            assert sum(now.values()) <= cap
            assert {one for one, nbytes in now.items() if nbytes} == (
                {name} if room == "for one" else {*order[: n + 1]}
            )
        assert "fake" in models["heart"].backend
    assert set(held(models).values()) == {0}


def test_least_recently_chosen_closes_first(folders: dict[str, Path], tmp_path: Path) -> None:
    opened = [*folders.values(), f"third={folders['heart']}"]
    (case,) = find_cases([mask(tmp_path, "a", 0, 6)])
    with Models.open(opened, backend="fake", workers=1) as models:
        for name in models:
            models[name].synthesize(volume(0))
        need = held(models)
    with Models.open(
        opened, backend="fake", workers=1, max_memory=need["heart"] + need["abdomen"]
    ) as models:
        models["heart"].synthesize(volume(0))
        models["abdomen"].synthesize(volume(0))
        assert models.choose(case)[0] == "abdomen"
        models["third"].synthesize(volume(0))
        assert [name for name, nbytes in held(models).items() if nbytes] == ["abdomen", "third"]


def test_working_model_is_not_closed(folders: dict[str, Path]) -> None:
    """A model at work is never closed for another."""
    with Models.open(
        [*folders.values()], backend="fake", workers=1, batch=2, max_memory=20000
    ) as models:
        whole = [slab.hu for slab in models["heart"].slabs(volume(0))]
        slabs = models["heart"].slabs(volume(0))
        first = next(slabs).hu
        with pytest.raises(MemoryCapExceeded, match="of 20000 bytes are in use"):
            models["abdomen"].synthesize(volume(1))
        assert all(
            np.array_equal(a, b)
            for a, b in zip([first, *(slab.hu for slab in slabs)], whole, strict=True)
        )
        models["abdomen"].synthesize(volume(1))


def test_output_conflicts_precede_synthesis(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the way of a later model is named before the first model synthesizes."""
    masks, out = [mask(tmp_path, "a", 0, 205), mask(tmp_path, "b", 0, 6)], tmp_path / "out"
    out.mkdir()
    (out / "b_ct.nii.gz").write_bytes(b"a person's own")
    line = [
        "synth",
        *map(str, masks),
        "--output",
        str(out),
        "--backend",
        "fake",
        *(f"--model={folder}" for folder in folders.values()),
    ]
    assert run(main, line) == 2 and "b_ct.nii.gz is in the way" in capsys.readouterr().err
    assert [*results(out)] == ["b_ct.nii.gz"]


class Tight(FakeEngine):
    """Short of memory as a GPU may be: when a slot starts, then when one is made."""

    short = ""

    def open_stream(self) -> Stream:
        if self.short == "made":
            raise MemoryCapExceeded("no room")
        return super().open_stream()

    def run(self, inputs: Inputs, out: np.ndarray, *, stream: Stream) -> None:
        if self.short == "started":
            self.short = "made"
            raise MemoryCapExceeded("no room")
        super().run(inputs, out, stream=stream)
        self.short = "started" if self.short == "soon" else self.short


def test_one_slot_model_can_be_released() -> None:
    """A model that has room for one slot alone synthesizes in it, and can be closed afterwards."""
    manifest = fake_manifest()
    engine = Tight(manifest, options=EngineOptions(workers=1))
    with Synthesizer(manifest, engine, again=lambda: FakeEngine(manifest)) as synth:
        engine.short = "soon"
        whole = synth.synthesize(volume(0))  # in the one slot that found room
        assert np.array_equal(synth.synthesize(volume(0)), whole)
        assert synth.release() and np.array_equal(synth.synthesize(volume(0)), whole)


@pytest.fixture(scope="module")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpu") / "model")


@pytest.mark.parametrize("backend", ["tensorrt", "onnx-cuda"])
@pytest.mark.parametrize("limit", ["cap", "device"])
def test_two_models_share_small_gpu(
    limit: str, backend: str, monkeypatch: pytest.MonkeyPatch, gpu_model: Path
) -> None:
    """The GPU has memory for one of them.

    Whether it is the cap that is short or the device: the other's engine is closed first, and what
    it held is back.
    """
    world = install(monkeypatch)
    with Models.open([f"a={gpu_model}"], backend=backend) as models:
        whole = [models["a"].synthesize(volume(n)) for n in range(4)]
        need = models.memory()["a"]["device"].held
        used = world.in_use("device")
    world.memory = used * 3 // 2 if limit == "device" else world.memory
    cap = need * 3 // 2 if limit == "cap" else None
    with Models.open(
        [f"{name}={gpu_model}" for name in "ab"], backend=backend, max_memory=cap
    ) as models:
        for n in range(4):
            assert np.array_equal(models["ab"[n % 2]].synthesize(volume(n)), whole[n])
            assert (
                cap is None
                or sum(kinds["device"].held for kinds in models.memory().values()) <= cap
            )
    assert world.left() == {}


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_reopened_engine_gives_same_bytes(backend: str, model: Path) -> None:
    with Models.open([model], backend=backend) as models:
        synthesizer = models[model.name]
        before, first = synthesizer.synthesize(volume(0)), synthesizer.backend
        assert (
            synthesizer.release()
            and not synthesizer.release()
            and set(held(models).values()) == {0}
        )
        assert (
            np.array_equal(synthesizer.synthesize(volume(0)), before)
            and synthesizer.backend == first
        )
