"""`masm app` in a real browser: a file in, the report out, and nothing leaves the machine."""

from __future__ import annotations

import shutil

import pytest
from command_line import assert_one_line, code_of
from masm_detect.casework.app import LOOPBACK, build_app, serve
from masm_detect.casework.detector import ScoreOptions, load_detector
from trained_runs import face_photograph, face_recipe, tiny_run, write_rgb

gradio = pytest.importorskip("gradio", reason="masm app needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")


@pytest.fixture
def page():
    """A page of the installed Chromium, or of the one that playwright has installed."""
    with playwright.sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(
                f"no Chromium: apt install chromium, or playwright install chromium ({str(error).splitlines()[0]})"
            )
        yield browser.new_page()
        browser.close()


def test_a_file_is_analyzed_in_the_browser(tmp_path, page):
    detector = load_detector(tiny_run(tmp_path, face_recipe()), "cpu")
    picture = write_rgb(tmp_path / "portrait.png", face_photograph())
    app = build_app(detector, ScoreOptions())
    address = serve(app, None, browser=False, block=False)
    outside = []
    page.on("request", lambda request: outside.append(request.url) if LOOPBACK not in request.url else None)
    try:
        page.goto(address)
        page.get_by_text("It is not calibrated").wait_for(timeout=60_000)
        page.get_by_role("button", name="Analyze").click()
        page.get_by_text("Choose at least one picture").wait_for(timeout=60_000)
        page.set_input_files("input[type=file]", str(picture))
        # the list of files shows the stem and the suffix apart; the whole name is only there during the upload
        page.get_by_text("portrait", exact=True).wait_for(timeout=60_000)
        page.get_by_role("button", name="Analyze").click()
        report = page.frame_locator("iframe[title=report]")
        report.get_by_role("heading", name="portrait.png").wait_for(timeout=60_000)
        words = report.locator("body").inner_text()
        assert "No verdict: the run is not calibrated" in words and "A map is no proof" in words
        assert "SHA-256" in words and report.locator("img").count() >= 3
        page.get_by_text(".json", exact=True).wait_for(timeout=60_000)
    finally:
        app.close()
    # pictures of the page itself are inside it; fonts and scripts come from the server
    assert not [url for url in outside if not url.startswith(("data:", "blob:", "about:"))], outside


def test_only_this_machine_can_connect(tmp_path):
    app = build_app(load_detector(tiny_run(tmp_path), "cpu"), ScoreOptions())
    address = serve(app, None, browser=False, block=False)
    try:
        assert address.startswith(f"http://{LOOPBACK}:") and app.share_url is None and not app.share
        assert app.server_name == LOOPBACK
    finally:
        app.close()


def test_a_run_that_cannot_score_is_refused_at_once(tmp_path, capsys):
    assert code_of(["app", str(tiny_run(tmp_path, None)), "--device", "cpu", "--no_browser"]) == 2
    assert_one_line(capsys.readouterr().err, "crops.json")
