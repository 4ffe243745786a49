"""The program that measures the loader and sets of samples, with tiny settings."""

import json

import pytest

pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")
pytest.importorskip("transformers", reason="needs the extra masm_ext[detect]")


def test_quick_run(tmp_path, capsys):
    import data

    out = tmp_path / "data.json"
    assert data.main(["--quick", "--out", str(out), "--workers", "0", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| jpeg-1024 | workers-1 |" in printed and "Bytes a sample" in printed
    content = json.loads(out.read_text())
    for kind in data.FILES:
        found = content["loader"][kind]["seconds"]
        assert list(found) == ["decode", "workers-0", "workers-1"]
        assert found["decode"]["ratio"]["median"] == 1 and found["workers-0"]["ratio"]["median"] > 0.5
    held = content["samples"]["bytes_each"]
    assert held["Samples"] < 100 < held["list"]
    assert list(content["samples"]["reading"]) == ["128", "640"]
    assert data.main(["--quick", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
