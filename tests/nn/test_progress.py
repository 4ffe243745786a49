"""A bar on a terminal, lines elsewhere."""

import io

import pytest

from masm_ext.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("total", [7, 10, 1000])
def test_a_log_gets_a_line_each_tenth(total):
    log = io.StringIO()
    for _ in Progress(range(total), file=log, mininterval=0, miniters=1, desc="layers", leave=False):
        pass
    lines = log.getvalue().splitlines()
    assert 2 <= len(lines) <= 12 and "\r" not in log.getvalue()
    assert lines[0].startswith("layers:   0%") and lines[-1].startswith("layers: 100%")


def test_without_a_total_there_is_one_line():
    log = io.StringIO()
    with Progress(file=log, mininterval=0, miniters=1) as bar:
        for _ in range(50):
            bar.update()
    assert len(log.getvalue().splitlines()) == 1 and "50it" in log.getvalue()


def test_an_interrupted_bar_shows_where_it_stopped():
    log = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(total=100, file=log, mininterval=0) as bar:
        bar.update(13)
        raise KeyboardInterrupt
    assert "13/100" in log.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar_and_silence_is_silent():
    terminal, log = Terminal(), io.StringIO()
    for _ in Progress(range(20), file=terminal, mininterval=0, miniters=1):
        pass
    assert terminal.getvalue().count("\r") > 10
    for _ in Progress(range(20), file=log, disable=True):
        pass
    assert log.getvalue() == ""
