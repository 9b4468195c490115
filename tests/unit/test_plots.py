"""The documents' tables, as the plots read them."""

from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.workloads import WORKLOADS


@pytest.mark.parametrize(
    ("cell", "figure"),
    [
        ("23,541", 23541.0),
        ("8,545, 8,491 (8,620 ¹)", 8518.0),
        ("6.25 … 6.75", 6.5),
        ("**0.97**", 0.97),
        ("436,987 ³", 436987.0),
        ("–", None),
    ],
)
def test_figures_of_a_cell(cell: str, figure: float | None) -> None:
    assert plots.figure_in(cell) == figure


def test_tables() -> None:
    text = "| a ¹ | b | b |\n|---|---|---|\n| 1 | 2 | 3 |\n\ntext\n| c |\n|---|\n| 4 |\n| 5 |\n"
    assert plots.tables(text) == [[{"a": "1", "b": "2"}], [{"c": "4"}, {"c": "5"}]]
    assert plots.table_with(text, "c")[1] == {"c": "5"}
    with pytest.raises(LookupError):
        plots.table_with(text, "c", 1)


@pytest.mark.parametrize("shape", [0, 1])
def test_every_workload_is_plotted(shape: int) -> None:
    names, series = plots.engines((plots.DOCS / "performance.md").read_text(), shape)
    assert len(names) == len(WORKLOADS)
    for engine, values in series.items():
        assert len(values) == len(names) and None not in values, engine
    for others in zip(*list(series.values())[:2], strict=True):
        assert max(other for other in others if other is not None) == 1.0


def test_plots_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the extra bench is not installed")
    monkeypatch.setattr("sys.argv", ["plots", "--out", str(tmp_path)])
    plots.main()
    for name in plots.PLOTS:
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
        assert (plots.DOCS / f"{name}.svg").is_file()
