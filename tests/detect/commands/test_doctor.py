"""`masm doctor`: exit codes, the report files and the page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from command_line import assert_one_line, code_of
from masm_detect.commands.main import USER_ERROR
from pictures import write_picture


@pytest.fixture
def data(tmp_path):
    for kind in ("real", "fake-x"):
        for i in range(25):
            write_picture(tmp_path / "set <1>" / kind / f"{kind}{i}.jpg", i + 100 * (kind != "real"))
    return tmp_path / "set <1>"


class Page(HTMLParser):
    """The text of a page, what it loads, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "line", "circle", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_clean_set_and_one_with_errors(data, tmp_path, capsys):
    arguments = ["doctor", str(data), "--limit=20", "--progress=false"]
    assert code_of([*arguments, "--splits=[train]"]) == USER_ERROR and "splits" in capsys.readouterr().err
    assert code_of(arguments) == 0
    out = capsys.readouterr().out
    assert "no error" in out and "ERROR" not in out and "96 x 96" in out
    for i in range(5):
        shutil.copy(data / "real" / f"real{i}.jpg", data / "fake-x" / f"copy{i}.jpg")
    (data / "real" / "real9.jpg").write_bytes(b"")
    folder = tmp_path / "report"
    assert code_of([*arguments, f"--out={folder}"]) == 1
    out = capsys.readouterr().out
    assert "ERROR (label): 5 files are labelled both real and fake" in out and "and 2 more" in out and "2 errors" in out
    assert "ERROR (damaged)" in out and "real9.jpg is empty" in out
    report = json.loads((folder / "report.json").read_text())
    errors = {problem["kind"] for problem in report["problems"] if problem["level"] == "error"}
    assert report["errors"] == 2 and errors == {"label", "damaged"}
    page = Page((folder / "report.html").read_text())
    text = " ".join(page.text)
    assert page.open == [] and page.links == [] and "set <1>" in text and "real9.jpg is empty" in text
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json"}
    # a report is not replaced unasked
    assert code_of([*arguments, f"--out={folder}"]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "already holds a report")
    assert code_of([*arguments, f"--out={folder}", "--overwrite"]) == 1


def test_mistakes_are_one_line(data, tmp_path, capsys):
    for arguments, message in (
        ([f"{tmp_path}/none"], "there is no such file or folder"),
        ([data, data], "given twice"),
        ([data, "--limit=0"], "limit is 0"),
        ([data, f"--out={data}/real/real0.jpg"], "is a file"),
        ([], "data"),
    ):
        assert code_of(["doctor", *map(str, arguments), "--progress=false"]) == USER_ERROR
        assert_one_line(capsys.readouterr().err, message)


def test_names_that_are_not_utf_8(data, tmp_path):
    """Old archives have them, and a terminal cannot show them."""
    shutil.copy(data / "real" / "real0.jpg", os.fsencode(data / "fake-x") + b"/caf\xe9.jpg")
    arguments = [str(data), "--limit=20", "--progress=false", f"--out={tmp_path / 'report'}"]
    run = subprocess.run([sys.executable, "-m", "masm_detect", "doctor", *arguments], capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    page = (tmp_path / "report" / "report.html").read_text()
    assert r"caf\udce9.jpg" in run.stdout and r"caf\udce9.jpg" in page
    assert r"caf\udce9.jpg" in (tmp_path / "report" / "report.json").read_text()
