"""Runs `masm` in this process, and looks at what it prints."""

from __future__ import annotations

from masm_detect.commands.main import main


def code_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code)


def assert_one_line(err: str, message: str) -> None:
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err
