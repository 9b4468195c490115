"""The plots of docs/: what its tables say, as pictures. Run it again when a table has changed.

    python -m benchmarks.plots                     docs/performance.svg, docs/attention.svg, docs/speculation.svg
    python -m benchmarks.plots --out FOLDER

The tables are the only place where figures are written down. Needs matplotlib (extra `bench`).
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?")
PARENTHESES = re.compile(r"\([^)]*\)")
ENGINES = {"vLLM 0.26.0": "#9ecae1", "SGLang 0.5.16": "#6baed6", "Gorgon, engine": "#fd8d3c", "pipeline": "#d94801"}
Table = list[dict[str, str]]


def tables(text: str) -> list[Table]:
    """Markdown's, in their order: rows by column. Marks behind a column's name belong to its footnotes."""
    found: list[Table] = []
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = [cell.rstrip(" ¹²³⁴") for cell in cells]
            found.append([])
        elif set(cells[0]) != {"-"}:
            row: dict[str, str] = {}
            for column, cell in zip(header, cells, strict=True):
                row.setdefault(column, cell)  # of columns with the same name the first
            found[-1].append(row)
    return found


def table_with(text: str, column: str, index: int = 0) -> Table:
    """The one of so many that have the column. Raises LookupError."""
    having = [table for table in tables(text) if table and column in table[0]]
    if index >= len(having):
        raise LookupError(f"no table {index} with a column {column!r}")
    return having[index]


def figure_in(cell: str) -> float | None:
    """The mean of a cell's figures, those in parentheses left out; None: it has none."""
    numbers = [float(number.replace(",", "")) for number in NUMBER.findall(PARENTHESES.sub("", cell))]
    return statistics.mean(numbers) if numbers else None


def engines(text: str, shape: int) -> tuple[list[str], dict[str, list[float | None]]]:
    """(workloads, by engine the figure by that of the better of the other two). Of milliseconds it is the other way round."""
    names: list[str] = []
    series: dict[str, list[float | None]] = {engine: [] for engine in ENGINES}
    for row in table_with(text, "Gorgon, engine", shape):
        figures = {engine: figure_in(row[engine]) for engine in ENGINES}
        slow = row["workload"].endswith("ms")
        others = [figure for figure in list(figures.values())[:2] if figure is not None]
        best = min(others) if slow else max(others)
        names.append(row["workload"].split(",")[0])
        for engine, figure in figures.items():
            series[engine].append(None if figure is None else best / figure if slow else figure / best)
    return names, series


def draw_engines(figure: Any) -> None:
    text = (DOCS / "performance.md").read_text()
    for shape, (axes, title) in enumerate(
        zip(figure.subplots(1, 2, sharey=True), ("Qwen3-0.6B shape", "Llama-3.1-8B shape"), strict=True)
    ):
        names, series = engines(text, shape)
        for number, (engine, values) in enumerate(series.items()):
            places = [place + 0.2 * (number - 1.5) for place in range(len(names))]
            label = "Gorgon, whole pipeline" if engine == "pipeline" else engine
            axes.bar(places, [value or 0.0 for value in values], 0.2, color=ENGINES[engine], label=label)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axes.set(title=title)
        axes.grid(axis="y", alpha=0.3)
        if not shape:
            axes.set_ylabel("times the better of vLLM and SGLang")
            axes.legend()


def draw_attention(figure: Any) -> None:
    rows = table_with((DOCS / "performance.md").read_text(), "sequences × context")
    columns = [column for column in rows[0] if column != "sequences × context"]
    axes = figure.subplots()
    for number, row in enumerate(rows):
        values = [figure_in(row[column]) or 0.0 for column in columns]
        places = [place + 0.4 * (number - 0.5) for place in range(len(columns))]
        color = ENGINES["Gorgon, engine" if row["sequences × context"] == "Gorgon" else "vLLM 0.26.0"]
        axes.bar(places, values, 0.4, label=row["sequences × context"], color=color)
    axes.axhline(4.25, color="grey", linewidth=0.8, linestyle="--", label="copies on the device")
    axes.set_xticks(range(len(columns)), columns)
    axes.set(title="paged decode attention", xlabel="sequences × context", ylabel="TB/s", ylim=(0, 5.5))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", ncols=3)


def speed_up(text: str) -> list[tuple[int, float, float, float]]:
    """(batch, times plain decoding, and its 95 % interval), greedy."""
    points = []
    for row in table_with(text, "greedy"):
        low, high = (float(end) for end in row["95 %"].split(" … "))
        points.append((int(row["batch"]), float(row["greedy"]), low, high))
    return points


def draw_speculation(figure: Any) -> None:
    batches, middle, low, high = zip(*speed_up((DOCS / "speculation.md").read_text()), strict=True)
    axes = figure.subplots()
    axes.fill_between(batches, low, high, alpha=0.25, color=ENGINES["Gorgon, engine"], label="95 %")
    axes.plot(batches, middle, marker="o", color=ENGINES["pipeline"], label="greedy")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(title="Medusa heads, 150 M parameters, held-out books", xlabel="batch", ylim=(0, None))
    axes.set_ylabel("times plain decoding")
    axes.grid(alpha=0.3)
    axes.legend()


PLOTS = {
    "performance": (draw_engines, (13, 4.6)),
    "attention": (draw_attention, (8, 3.6)),
    "speculation": (draw_speculation, (8, 3.6)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder")
    args = parser.parse_args()
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "gorgon", "svg.fonttype": "none"}  # the same bytes each time; text as text
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (draw, size) in PLOTS.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(args.out / f"{name}.svg", metadata={"Date": None})
        print(args.out / f"{name}.svg")


if __name__ == "__main__":
    main()
