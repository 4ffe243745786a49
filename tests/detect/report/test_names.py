"""Names of files, runs and data sets appear as they are: in tables, figures and pages nothing of them is markup."""

from __future__ import annotations

from types import SimpleNamespace

from masm_detect.report.casework import prediction_table
from masm_detect.report.page import figure_svg
from masm_detect.report.plots import new_figure, save_figure
from masm_detect.report.tables import show
from rich.table import Table

NAME = "clip [abc] [/b] :fire: a$x_$ <b>"


def test_tables(capsys):
    file = SimpleNamespace(
        file=NAME, p_fake=0.5, calibrated=None, verdict="unsure", scored=1, wanted=1, tracks={None: 0.5}
    )
    show(prediction_table([file]))
    table = Table(title=NAME, caption=NAME)
    table.add_column(NAME)
    table.add_row(NAME)
    show(table)
    assert capsys.readouterr().out.count(NAME) == 5


def test_figures(tmp_path):
    figure, ((axes,),) = new_figure()
    axes.set_title(NAME)
    axes.plot([0], [0], label=NAME)
    axes.legend()
    assert "<b>" not in figure_svg(figure)
    assert save_figure(figure, tmp_path / "a.png").stat().st_size > 1000
