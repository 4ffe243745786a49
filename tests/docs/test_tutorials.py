"""The tutorials run as they are written, from top to bottom, in an empty folder."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("masm_detect.commands.main", reason="needs the extra masm_ext[detect]")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(tutorial: Path, folder: Path) -> str:
    """Run the sh and python blocks of a page in `folder`; python blocks share their names. Returns what was printed."""
    blocks = BLOCK.findall(tutorial.read_text())
    assert blocks, f"{tutorial.name} has no sh or python block"
    environment = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    python = "\n".join(code for language, code in blocks if language == "python")
    commands = [["bash", "-euo", "pipefail", "-c", code] for language, code in blocks if language == "sh"]
    commands += [[sys.executable, "-c", python]] if python else []
    printed = ""
    for command in commands:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        printed += done.stdout
    return printed


def write_videos(folder: Path, number: int) -> None:
    """Videos of one face, moved, scaled and lit differently in each: plain ones, and ones with a blurred face."""
    import cv2
    import numpy as np
    from skimage.data import astronaut

    rng = np.random.default_rng(0)
    image = cv2.cvtColor(astronaut(), cv2.COLOR_RGB2BGR)[:320, 60:380]
    for label in ("real", "fake-blur"):
        (folder / label).mkdir(parents=True)
        for index in range(number):
            scale, light = rng.uniform(0.9, 1.2), rng.uniform(0.8, 1.2)
            path = str(folder / label / f"{label}-{index}.mp4")
            video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 10, (320, 320))
            for frame in range(8):
                move = np.float32([[scale, 0, frame - 10 * index % 20], [0, scale, index % 5]])
                picture = cv2.warpAffine(image, move, (320, 320), borderMode=cv2.BORDER_REFLECT)
                picture = np.clip(picture * light, 0, 255).astype(np.uint8)
                video.write(cv2.GaussianBlur(picture, (0, 0), 2) if label != "real" else picture)
            video.release()


@pytest.mark.long
def test_first_detector(repo, tmp_path):
    printed = run(repo / "docs/tutorials/first-detector.md", tmp_path)
    assert "upsample" in printed and (tmp_path / "eval/both/auc.png").is_file()


@pytest.mark.long
def test_clean_data(repo, tmp_path):
    write_videos(tmp_path / "videos", 8)
    printed = run(repo / "docs/tutorials/clean-data.md", tmp_path)
    assert "128 of 128 frames" in printed and (tmp_path / "report/report.html").is_file()


@pytest.mark.long
def test_own_videos(repo, tmp_path):
    write_videos(tmp_path / "videos", 8)
    printed = run(repo / "docs/tutorials/own-videos.md", tmp_path)
    assert "blur" in printed and (tmp_path / "eval/mine/results.json").is_file()


def test_own_model(repo, tmp_path):
    assert "active blocks" in run(repo / "docs/tutorials/own-model.md", tmp_path)


def test_trainer(repo, tmp_path):
    pytest.importorskip("peft", reason="needs the extra masm_ext[peft]")
    printed = run(repo / "docs/tutorials/trainer.md", tmp_path)
    assert "resumed run is the same: True" in printed and "loaded adapter is the same: True" in printed
    losses = [float(x) for x in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.1


def test_every_page_is_in_the_navigation(repo):
    pages = {str(p.relative_to(repo / "docs")) for p in (repo / "docs").rglob("*.md")}
    listed = set(re.findall(r": ([\w/-]+\.md)$", (repo / "mkdocs.yml").read_text(), re.MULTILINE))
    assert pages == listed


def test_the_options_that_the_pages_name_exist(repo, capsys):
    from masm_detect.commands.main import COMMANDS, main

    for command in set(COMMANDS) - {"env"}:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = set(re.findall(r"--([\w.-]+)", capsys.readouterr().out))
        for page in (repo / "docs").rglob("*.md"):
            text = page.read_text()
            for call in re.findall(rf"^masm {command} .*(?:\\\n.*)*", text, re.MULTILINE):
                # a mapping has an option for each of its keys
                named = {
                    name.split(".")[0] if name.split(".")[0] in known else name
                    for name in re.findall(r"--([\w.-]+)", call.split("#")[0])
                }
                assert named <= known, f"{page.name}: masm {command} has no {named - known}"
