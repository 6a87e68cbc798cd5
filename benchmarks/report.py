"""Write the recorded measurements as one page, or the tables of the documentation.

    python benchmarks/report.py [-o FILE.html] [--pictures FOLDER] [--tables]

The page holds all pictures: the newest record of every suite and machine as a table, and each ratio
from commit to commit. `--tables` writes the newest tables of some suites between the page's two
marks.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.harness.history import HISTORY, Record, fingerprint, load, ratio_of
from runtime.core.atomic_files import write_text
from runtime.core.console import EXIT_CODES, run
from runtime.core.errors import UsageError, writing
from runtime.viewer.page import page
from train.reporting.html import figure, picture, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT = "A light network, by engine: slices a second on its own canvas"
# Suite → the table of docs/results/throughput.md that shows its newest record at full size.
TABLES = {
    "engine": LIGHT,
    "engine edge 256x256": LIGHT,
    "engine reference 256x256": (
        "The original's network, by engine: slices a second on its own canvas"
    ),
    "stream": "A mask file to a CT file, 300 x 512 x 512, .nii.gz to .nii.gz: slices a second",
}
BEGIN, END = "<!-- benchmarks: python benchmarks/report.py --tables -->", "<!-- /benchmarks -->"


def main(argv: Sequence[str]) -> int:
    """Write the page or the table; returns the exit code.

    Args:
        argv: The command line without the program's name.

    Raises:
        UsageError: There are no records, or the page has no marks.
    """
    parser = argparse.ArgumentParser(
        "report.py", description="Recorded measurements as one HTML page.", epilog=EXIT_CODES
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "runs" / "benchmarks.html")
    parser.add_argument(
        "--history",
        type=Path,
        default=HISTORY,
        help="the records (default: benchmarks/results/history.jsonl)",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="also write the page's pictures there, as PNG files",
    )
    parser.add_argument(
        "--tables", action="store_true", help="write docs/results/throughput.md instead"
    )
    options = parser.parse_args(argv)
    records = load(options.history)
    if not records:
        raise UsageError(
            f"{options.history} holds no records",
            expected="results of `benchmarks/run.py … --record`",
            remedy="record some first",
        )
    if options.tables:
        document = ROOT / "docs" / "results" / "throughput.md"
        write_text(document, with_table(document.read_text(encoding="utf-8"), records))
        print(f"wrote the tables in {document}")
        return 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_page(options.output, records, options.pictures)
    print(f"wrote {options.output}")
    return 0


def newest(records: Iterable[Record]) -> list[Record]:
    """The last record of each suite, options and machine.

    Args:
        records: Records, oldest first.

    Returns:
        Records in the order in which they first came.
    """
    last: dict[tuple[str, str, str], Record] = {}
    for record in records:
        last[record["suite"], repr(sorted(record["options"].items())), fingerprint(record)] = record
    return list(last.values())


def rows(record: Record) -> list[list[str]]:
    """A record as a table.

    Args:
        record: The record.

    Returns:
        The head, then a row for each contender. Rates are the median, and the rate that nine of ten
        rounds reach ("p90"). A column that is empty everywhere is left out.
    """
    columns: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
        "": lambda name, row: name,
        record["unit"]: lambda name, row: si(row["median"]),
        "p90": lambda name, row: si(1 / row["p90_seconds"]),
        "a call, ms: p50 / p90 / p99": lambda name, row: " / ".join(
            f"{ms:.3g}" for ms in row.get("call_ms", {}).values()
        ),
        "peak MiB": lambda name, row: f"{row['peak_rss'] / 2**20:.0f}" if "peak_rss" in row else "",
        "GPU MiB": lambda name, row: f"{row['vram'] / 2**20:.0f}" if "vram" in row else "",
        "error": lambda name, row: f"{row['error']:.3g}" if "error" in row else "",
        "of the roof": lambda name, row: (
            f"{row['share_of_roof']:.0%} {row.get('roof', '')}".strip()
            if "share_of_roof" in row
            else ""
        ),
        "ours / this": lambda name, row: (
            f"{ratio_of(record, name)}" if name in record["ratios"] else ""
        ),
    }
    body = [
        [cell(name, row) for cell in columns.values()] for name, row in record["contenders"].items()
    ]
    filled = [n for n in range(len(columns)) if n == 0 or any(line[n] for line in body)]
    return [[line[n] for n in filled] for line in ([*columns], *body)]


def target_verdicts(record: Record) -> list[str]:
    """Check the targets that contenders state for their facts (`at_most`).

    Args:
        record: The record.

    Returns:
        A line for each target that says whether it is met.
    """
    lines = []
    for name, row in record["contenders"].items():
        for fact, most in row.get("at_most", {}).items():
            verdict = "held" if row[fact] <= most else "NOT HELD"
            lines.append(
                f"bar: {name}: {fact.replace('_', ' ')} {row[fact]:.3g}, at most {most:g}:"
                f" {verdict}"
            )
    return lines


def in_columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Set a table in columns of text.

    Args:
        table: Rows of cells.

    Returns:
        Lines; the first column is aligned left, the others right.
    """
    widths = [max(len(row[n]) for row in table) for n in range(len(table[0]))]
    return [
        "  ".join(
            c.rjust(w) if n else c.ljust(w)
            for n, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def si(number: float) -> str:
    """Write a number with three or four digits and a prefix, such as 217.4 or 2.17 G.

    Args:
        number: The number.
    """
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= factor:
            return f"{number / factor * (10 if prefix == ' k' else 1):.3g}{prefix}"
    return f"{number:.4g}"


def measured_on(record: Record) -> str:
    """Say where and when a record was measured.

    Args:
        record: The record.

    Returns:
        Date, commit, machine, versions, rounds and load.
    """
    m = record["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    load = ", ".join(f"{key} {value}" for key, value in record["load"].items())
    rounds = len(next(iter(record["contenders"].values()))["rates"])
    return (
        f"{record['date']}, commit {m['commit']}, {fingerprint(record)}, Python {m['python']},"
        f" {packages}; {rounds} rounds in turn; {load}"
    )


def write_page(path: Path, records: Sequence[Record], pictures: Path | None = None) -> None:
    """Write one self-contained HTML page.

    Args:
        path: The page's file.
        records: All records, oldest first.
        pictures: A folder for each picture as a PNG file too.

    Raises:
        OutputError: A file cannot be written.
    """
    sections = []
    for record in newest(records):
        head, *body = rows(record)
        settings = ", ".join(f"{key} {value}" for key, value in record["options"].items())
        content = table(head, body) + f"<p class=note>{html.escape(measured_on(record))}</p>"
        content += "".join(
            f"<p>absent: {html.escape(name)} ({html.escape(why)})</p>"
            for name, why in record["absent"].items()
        )
        same = [r for r in records if alike(r, record)]
        charts = {"ratios": ratios(record)} if record["ratios"] else {}
        if len(same) > 1 and record["ratios"]:
            charts["course"] = course(same)
        sections.append(
            (
                f"{record['suite']}: {settings}",
                content
                + "".join(picture(f, f"{name} of {record['suite']}") for name, f in charts.items()),
            )
        )
        if pictures is not None:
            with writing(pictures):
                pictures.mkdir(parents=True, exist_ok=True)
                for name, chart in charts.items():
                    chart.savefig(
                        pictures
                        / f"{re.sub(r'[^a-z0-9]+', '-', record['suite'].lower())}-{name}.png",
                        dpi=110,
                    )
    lead = (
        "Contenders took turns in every round. A ratio is ours / the other contender, with the"
        " interval that holds the true median; see docs/results/benchmarks.md."
    )
    page(path, "mask2ct: benchmarks", lead, sections)


def alike(a: Record, b: Record) -> bool:
    """Whether two records can be compared.

    Args:
        a: A record.
        b: Another record.

    Returns:
        Whether suite, options and machine are the same.
    """
    return (a["suite"], a["options"], fingerprint(a)) == (b["suite"], b["options"], fingerprint(b))


def ratios(record: Record) -> Figure:
    """A chart of a record's ratios with their intervals; grey where there is no difference.

    Args:
        record: The record.
    """
    names = [*record["ratios"]][::-1]
    drawn = figure(9, 0.9 + 0.28 * len(names))
    axes = drawn.subplots()
    for place, name in enumerate(names):
        r = ratio_of(record, name)
        color = "#888" if not r.differs else "#1a6" if r.value > 1 else "#c33"
        axes.errorbar(
            r.value,
            place,
            xerr=[[r.value - r.least], [r.most - r.value]],
            marker="o",
            capsize=3,
            color=color,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"{next(iter(record['contenders']))}: times as fast as this")
    _times(
        axes.xaxis, [getattr(ratio_of(record, n), end) for n in names for end in ("least", "most")]
    )
    axes.axvline(1, color="#999", linewidth=1)
    return drawn


def course(records: Sequence[Record]) -> Figure:
    """A chart of the ratios of one suite on one machine from commit to commit.

    Args:
        records: Records that can be compared, oldest first.
    """
    names = list(dict.fromkeys(n for r in records for n in r["ratios"]))
    drawn = figure(9, max(3.5, 1 + 0.2 * len(names)))
    axes = drawn.subplots()
    ends = []
    for n, name in enumerate(names):
        aside = 0.5 * ((n + 0.5) / len(names) - 0.5)
        points = [
            (x + aside, ratio_of(r, name)) for x, r in enumerate(records) if name in r["ratios"]
        ]
        spread = [[r.value - r.least for _, r in points], [r.most - r.value for _, r in points]]
        style: dict[str, Any] = {
            "marker": "o",
            "markersize": 4,
            "capsize": 2,
            "linewidth": 1,
            "color": f"C{n % 10}",
            "linestyle": "-" if n < 10 else "--",
        }
        axes.errorbar(
            [x for x, _ in points],
            [r.value for _, r in points],
            yerr=spread,
            label=f"ours / {name}",
            **style,
        )
        ends += [end for _, r in points for end in (r.least, r.most)]
    axes.axhline(1, color="#999", linewidth=1)
    axes.set_xticks(
        range(len(records)), [f"{r['machine']['commit']}\n{r['date']}" for r in records]
    )
    _times(axes.yaxis, ends)
    axes.set_ylabel("times as fast")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def _times(axis: Any, values: Iterable[float]) -> None:
    """Give `axis` a logarithmic scale in plain numbers that holds all `values`, and 1."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    least, most = min(1.0, *values) / 1.1, max(1.0, *values) * 1.1
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if most / least < 12 else (1, 2, 5)
    ticks = [m * 10.0**n for n in range(-3, 5) for m in steps]
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(least, most)
    axis.set_major_locator(FixedLocator([tick for tick in ticks if least <= tick <= most]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def with_table(text: str, records: Sequence[Record]) -> str:
    """Replace the tables in a page.

    Args:
        text: The page's text.
        records: All records, oldest first.

    Returns:
        The text with everything between its marks replaced.

    Raises:
        UsageError: The text does not hold both marks once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UsageError(
            "the page has no place for the table",
            expected=f"{BEGIN} and {END}, once each",
            remedy="put them back",
        )
    tables: list[str] = []
    last = {
        (TABLES[r["suite"]], fingerprint(r)): r
        for r in records
        if r["suite"] in TABLES and not r["options"]["quick"]
    }
    for (title, _), record in sorted(
        last.items(), key=lambda item: [*TABLES.values()].index(item[0][0])
    ):
        head, *body = rows(record)
        lines = [head, [":--", *["--:"] * (len(head) - 1)], *body]
        tables += [
            f"**{title}**",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            f"<sub>{measured_on(record)}</sub>",
            "",
        ]
    return re.sub(
        re.escape(BEGIN) + ".*?" + re.escape(END),
        lambda _: "\n".join([BEGIN, "", *tables, END]),
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    sys.exit(run(main))
