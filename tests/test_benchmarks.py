"""What benchmarks count and print. Their timing is nobody's test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import report
from benchmarks.gpu import contenders as gpu
from benchmarks.harness import libraries, macs, models, reproducibility, roofline, targets
from benchmarks.harness.history import load
from benchmarks.harness.paired import Contender, Measured, Ready
from benchmarks.harness.roofline import PEAK, peaks_for, shares
from benchmarks.suites import coldstart, engine, stream
from runtime import Synthesizer
from runtime.core.errors import MissingComponent, UsageError
from runtime.core.manifest import Manifest
from runtime.engines.gpu.probe import why_no_gpu


def graph(path: Path) -> Path:
    """Cast → Conv 3x3 (2 → 4, in pairs of groups) → ConvTranspose 4x4, stride 2 (4 → 1), sizes
    unknown.
    """
    weights = {"a": np.zeros((4, 1, 3, 3), np.float32), "b": np.zeros((4, 1, 4, 4), np.float32)}
    nodes = [
        helper.make_node("Cast", ["labels"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "a"], ["y"], pads=[1, 1, 1, 1], group=2),
        helper.make_node("ConvTranspose", ["y", "b"], ["z"], strides=[2, 2], pads=[1, 1, 1, 1]),
    ]
    given = helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", 2, "H", "W"])
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 1, "h", "w"])
    made = helper.make_graph(
        nodes, "g", [given], [out], [numpy_helper.from_array(w, n) for n, w in weights.items()]
    )
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


def test_graph_gives_macs_and_bytes(tmp_path: Path) -> None:
    """Multiply-accumulates and bytes are counted from the graph."""
    path, sizes = graph(tmp_path / "g.onnx"), {"N": 2, "H": 8, "W": 16}
    convolution, transposed = 2 * 4 * 8 * 16 * 9, 2 * 4 * 8 * 16 * 16
    assert macs.count(path, sizes) == convolution + transposed
    first, second = 2 * 2 * 8 * 16 + 4 * 9 + 2 * 4 * 8 * 16, 2 * 4 * 8 * 16 + 4 * 16 + 2 * 16 * 32
    assert macs.traffic(path, sizes, bytes_per_value=2) == 2 * (first + second)


def test_record_becomes_page_and_readme_table(tmp_path: Path) -> None:
    from test_paired import record

    rng = np.random.default_rng(0)
    older, newer = record(rng, 2.0, "aaaaaaa"), record(rng, 3.0, "bbbbbbb")
    page = tmp_path / "page.html"
    report.write_page(page, [older, newer], tmp_path / "pictures")
    text = page.read_text()
    assert "bbbbbbb" in text and text.count("data:image/png;base64,") == 2 and "<script" not in text
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == [
        "stream-course.png",
        "stream-ratios.png",
    ]
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    shown = {**newer, "options": {"quick": False}}
    written = report.with_table(readme, [older, shown])
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert (
        "| ours |" in written
        and "bbbbbbb" in written
        and report.with_table(written, [shown]) == written
    )
    assert "| ours |" not in report.with_table(readme, [newer])  # a quick run is none to show
    with pytest.raises(UsageError, match="no place for the table"):
        report.with_table("no marks", [newer])


def test_committed_records_give_the_tables(root: Path) -> None:
    """Those of docs/results/throughput.md; the README shows the rows of its last one."""
    page = (root / "docs" / "results" / "throughput.md").read_text(encoding="utf-8")
    assert page == report.with_table(page, load()), "run: python benchmarks/report.py --tables"
    tables = page.split(report.BEGIN)[1].split(report.END)[0]
    assert tables.count("commit ") >= 1 and " cores" in tables and "ours / this" in tables
    last = [line for line in tables.split("**")[-1].splitlines() if line.startswith("| ")]
    contenders = [line for line in last if "roof:" not in line]
    assert len(contenders) == 7  # a head, its rule, five rows
    assert "\n".join(contenders) in (root / "README.md").read_text(encoding="utf-8")


def test_share_of_nearest_roof() -> None:
    """A share is of the nearest limit and of the faster of its roofs."""
    ours, idle = Contender("ours", "m:f", cost={"fp32": 10, "memcpy": 1}), Contender("idle", "m:f")
    assert [c.name for c in peaks_for([ours, idle])] == [
        f"{PEAK}fp32 matrix product",
        f"{PEAK}fp32 3x3 convolution",
        f"{PEAK}memcpy",
    ]
    measured = {
        "ours": Measured((1.0, 2.0, 3.0)),
        "idle": Measured((1.0, 1.0, 1.0)),
        f"{PEAK}fp32 matrix product": Measured((20.0, 80.0, 20.0)),
        f"{PEAK}fp32 3x3 convolution": Measured((40.0, 40.0, 60.0)),
        f"{PEAK}memcpy": Measured((100.0, 100.0, 100.0)),
    }
    assert shares([ours, idle], measured) == {"ours": ("fp32", 0.25)}
    del measured[f"{PEAK}fp32 matrix product"], measured[f"{PEAK}fp32 3x3 convolution"]
    assert shares([ours], measured) == {"ours": ("memcpy", 0.02)}


def test_memory_and_disk_roofs_are_measured(tmp_path: Path) -> None:
    assert roofline.memcpy().run() == 1 << 28
    assert roofline.disk(str(tmp_path)).run() == 1 << 26 and not [
        path for path in tmp_path.rglob("*") if path.is_file()
    ]


def test_empty_table_columns_are_omitted() -> None:
    """The table has a column when at least one contender fills it."""
    from test_paired import record

    made = record(np.random.default_rng(0), 2.0)
    head, *body = report.rows(made)
    assert "GPU MiB" not in head and "of the roof" not in head and head[-1] == "ours / this"
    made["contenders"]["torch"] |= {
        "vram": 3 << 20,
        "roof": "fp32",
        "share_of_roof": 0.5,
        "call_ms": {"p50": 1.0, "p90": 2.0, "p99": 4.5},
    }
    head, *body = report.rows(made)
    line = dict(zip(head, body[1], strict=True))
    assert (line["GPU MiB"], line["of the roof"], line["a call, ms: p50 / p90 / p99"]) == (
        "3",
        "50% fp32",
        "1 / 2 / 4.5",
    )
    assert dict(zip(head, body[0], strict=True))["GPU MiB"] == ""


def test_runs_agree_where_intervals_overlap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *intervals: tuple[float, float, float]) -> str:
        ratios = {
            str(n): dict(zip(("least", "value", "most"), i, strict=True))
            for n, i in enumerate(intervals)
        }
        (tmp_path / name).write_text(json.dumps([{"suite": "engine", "ratios": ratios}]))
        return str(tmp_path / name)

    same = [(0.9, 1.0, 1.1)] * 9
    one, other, third = (
        run("a", *same, (2, 2.1, 2.2)),
        run("b", *same, (1.8, 1.9, 2.0)),
        run("c", *same[1:], (0.5, 0.6, 0.7), (1.8, 1.9, 1.95)),
    )
    assert reproducibility.main([one, other]) == 0
    assert '{"ratios": 10, "agree": 10, "held": 9}' in capsys.readouterr().out
    assert reproducibility.main([one, third]) == 1
    assert "apart: engine: ours / 9: 2.10 (2.00 … 2.20)" in capsys.readouterr().out
    (tmp_path / "bad").write_text("{}")
    with pytest.raises(UsageError, match="holds no records"):
        reproducibility.main([one, str(tmp_path / "bad")])


def test_hardest_contender_decides_the_bar() -> None:
    bar, made = targets.Target("at least twice as fast", 2.0, []), {"suite": "bar", "ratios": {}}
    for name, least, value, most in (("slow", 4, 5, 6), ("fast", 1.9, 2.1, 2.3)):
        made["ratios"][name] = {"least": least, "value": value, "most": most}
    held, said = targets.verdict(bar, made)
    assert held and "held, 2.1 (1.9 … 2.3) against fast" in said and "surely" not in said
    assert (
        targets.verdict(targets.Target("", 2.2, []), made)[0] is False
        and "surely held" in targets.verdict(targets.Target("", 1.9, []), made)[1]
    )


def test_contenders_synthesize_the_same_slices(model: Path, trained: Path) -> None:
    """Every contender that runs the network synthesizes the same slices."""
    given = {"model": str(model), "slices": 8}
    found: dict[str, Ready] = {
        "synthesizer": engine.synthesizer(**given, backend="auto"),
        "engine": engine.ours(**given, backend="auto"),
        "OpenVINO": libraries.by_openvino(**given, precision="fp32", batch=4),
        "ONNX Runtime": libraries.by_onnxruntime(**given, precision="fp32", batch=1),
        "PyTorch": libraries.by_pytorch(
            **given, trained=str(trained), way="channels_last", batch=8
        ),
    }
    generated = {name: ready.output() for name, ready in found.items() if ready.output is not None}
    assert generated["engine"].std() > 1 and generated["engine"].shape[0] == 8
    for name, values in generated.items():
        assert np.abs(values.astype(float) - generated["engine"]).mean() <= engine.HU["fp32"], name
    assert found["OpenVINO"].run() == 8 and found["OpenVINO"].run() == 8
    assert set(found["OpenVINO"].facts["call_ms"]) == {
        "p50",
        "p90",
        "p99",
    }  # of the third round: the first two set up and warm


def test_model_measured_at_other_size(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is measured at another size under the same proof."""
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    assert models.at_size(model, 64) == model
    larger = models.at_size(model, 96)
    with Synthesizer.open(larger) as synth:
        assert synth.manifest.grid.canvas == (96, 96) and "validated" in synth.backend
    assert engine.macs(larger) == pytest.approx(engine.macs(model) * (96 / 64) ** 2, rel=1e-3)


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU here")
@pytest.mark.parametrize("make", sorted(engine.GPU.values()))
def test_gpu_contender_states_its_absence(make: str, model: Path, trained: Path) -> None:
    """A contender that needs a GPU says why it does not run."""
    with pytest.raises(MissingComponent, match=r"driver|engine file|GPU"):
        getattr(gpu, make)(model=str(model), trained=str(trained), slices=8, batch=8)


def test_figure_states_whether_bar_holds() -> None:
    """A figure that has a bar says whether it holds the bar."""
    rows = {
        "ours": {"loader_share": 0.004, "at_most": {"loader_share": 0.05}},
        "slow": {"seconds": 21.5, "at_most": {"seconds": 20}},
        "free": {},
    }
    assert report.target_verdicts({"contenders": rows}) == [
        "bar: ours: loader share 0.004, at most 0.05: held",
        "bar: slow: seconds 21.5, at most 20: NOT HELD",
    ]


def test_help_names_every_suite(command) -> None:
    told = command("benchmarks/run.py", "--help").stdout
    assert all(
        suite in told
        for suite in ("engine", "stream", "memory", "coldstart", "io", "train", "commands")
    )
    done = command("benchmarks/run.py", "nonsense")
    assert done.returncode == 2 and "invalid choice" in done.stderr


def test_cold_start_ends_at_first_slab(fake_model: Path, tmp_path: Path) -> None:
    """A cold start ends with the first slab and not with the file."""
    mask = stream.write_mask(tmp_path / "mask.nii.gz", Manifest.load(fake_model), (24, 32, 32))
    given = {"model": str(fake_model), "backend": "fake"}
    ready = coldstart.start("written", **given, mask=str(mask), output=str(tmp_path / "out"))
    assert ready.run() == 1 and [*ready.facts["seconds"]] == ["import", "first written slab"]
    assert [file.suffix for file in (tmp_path / "out").iterdir() if "_ct" in file.name] == [
        ".gz"
    ]  # begun,
    assert not (tmp_path / "out" / "mask_ct.nii.gz").exists()  # and not ended
    generated = coldstart.start("synthesized", **given)
    assert generated.run() == 1 and min(generated.facts["seconds"].values()) > 0


@pytest.mark.slow
def test_io_suite_prints_table_and_json(command, tmp_path: Path) -> None:
    """The suite prints a table and one JSON line."""
    done = command("benchmarks/run.py", "io", "--quick", "--quiet", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    assert records == json.loads((tmp_path / "r.json").read_text()) and [
        r["suite"] for r in records
    ] == ["io read", "io write"]
    for record in records:
        assert record["machine"]["packages"]["numpy"] and all(
            min(row["rates"]) > 0 for row in record["contenders"].values()
        )
