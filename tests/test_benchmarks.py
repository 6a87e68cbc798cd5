"""What benchmarks count and print. Their timing is nobody's test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import macs, report
from runtime.errors import UsageError


def graph(path: Path) -> Path:
    """Cast → Conv 3x3 (2 → 4, in pairs of groups) → ConvTranspose 4x4, stride 2 (4 → 1), sizes unknown."""
    weights = {"a": np.zeros((4, 1, 3, 3), np.float32), "b": np.zeros((4, 1, 4, 4), np.float32)}
    nodes = [
        helper.make_node("Cast", ["labels"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "a"], ["y"], pads=[1, 1, 1, 1], group=2),
        helper.make_node("ConvTranspose", ["y", "b"], ["z"], strides=[2, 2], pads=[1, 1, 1, 1]),
    ]
    given = helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", 2, "H", "W"])
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 1, "h", "w"])
    made = helper.make_graph(nodes, "g", [given], [out], [numpy_helper.from_array(w, n) for n, w in weights.items()])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_multiply_accumulates_and_bytes_are_counted_from_the_graph(tmp_path: Path) -> None:
    path, sizes = graph(tmp_path / "g.onnx"), {"N": 2, "H": 8, "W": 16}
    convolution, transposed = 2 * 4 * 8 * 16 * 9, 2 * 4 * 8 * 16 * 16
    assert macs.count(path, sizes) == convolution + transposed
    first, second = 2 * 2 * 8 * 16 + 4 * 9 + 2 * 4 * 8 * 16, 2 * 4 * 8 * 16 + 4 * 16 + 2 * 16 * 32
    assert macs.traffic(path, sizes, bytes_per_value=2) == 2 * (first + second)


def test_a_record_becomes_a_page_and_the_readmes_table(tmp_path: Path) -> None:
    from test_paired import record

    rng = np.random.default_rng(0)
    older, newer = record(rng, 2.0, "aaaaaaa"), record(rng, 3.0, "bbbbbbb")
    page = tmp_path / "page.html"
    report.write_page(page, [older, newer])
    text = page.read_text()
    assert "bbbbbbb" in text and "data:image/png;base64," in text and "<script" not in text
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    shown = {**newer, "options": {"quick": False}}
    written = report.with_table(readme, [older, shown])
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert "| ours |" in written and "bbbbbbb" in written and report.with_table(written, [shown]) == written
    assert "| ours |" not in report.with_table(readme, [newer])  # a quick run is none to show
    with pytest.raises(UsageError, match="no place for the table"):
        report.with_table("no marks", [newer])


def test_every_suite_is_named_in_the_help(command) -> None:
    told = command("benchmarks/run.py", "--help").stdout
    assert all(suite in told for suite in ("engine", "stream", "memory", "coldstart", "io", "train"))
    done = command("benchmarks/run.py", "nonsense")
    assert done.returncode == 2 and "invalid choice" in done.stderr


@pytest.mark.slow
def test_the_io_suite_prints_a_table_and_one_json_line(command, tmp_path: Path) -> None:
    done = command("benchmarks/run.py", "io", "--quick", "--quiet", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    assert records == json.loads((tmp_path / "r.json").read_text()) and [r["suite"] for r in records] == ["io read", "io write"]
    for record in records:
        assert record["machine"]["packages"]["numpy"] and all(min(row["rates"]) > 0 for row in record["contenders"].values())
