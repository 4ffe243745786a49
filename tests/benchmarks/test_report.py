"""Tables and plots of a result file, and what moved between two of them."""

import json

import pytest
import torch

pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")


def made(ratio=1.1, width=0.01, **settings):
    """A small result file as run.py writes it, with one case of the suites layer and scale."""
    import bench
    import store
    from cases import Case
    from machine import describe

    layer = Case("layer", "8x8/R4", "float32", "frozen", {}, {("forward+backward", "masm"): 1.08})
    rows = {"frozen": [1.0] * 20, "masm": [ratio + width * (i - 9.5) / 10 for i in range(20)]}
    outcome = bench.Outcome(
        layer, refused={"broken": "y 1 > 1e-05"}, unavailable={"peft-lora": "needs the package peft"}
    )
    entries = bench.statistics(rows, "frozen")
    for entry in entries.values():
        entry |= {"flops": 1e9, "bytes": 1e7}
    outcome.add("forward+backward", entries)
    sweep = bench.Outcome(Case("scale", "M", "float32", "frozen", {"M": [1, 2, 4]}))
    for x in (1, 2, 4):
        sweep.add(f"M = {x}", bench.statistics({"frozen": [float(x)] * 5, "masm": [1.5 * x] * 5}, "frozen"))
    line = {"intercept": 0.0, "slope": 1.0, "residual": 0.0, "worst": 1.0, "straight": True}
    sweep.extra["lines"] = {"frozen": line, "masm": line | {"slope": 1.5}}
    cases = {o.case.key: o.to_dict() | {"launch": 0} for o in (outcome, sweep)}
    top = {"float32": {"flops": 2e9, "bytes": 1e9, "gemm": "8 x 8 x 8", "copy_bytes": 64}}
    launch = describe(torch.device("cpu")) | {"ceilings": top}
    head = {"format": store.FORMAT, "format_version": store.FORMAT_VERSION}
    base = {"device": "cpu", "threads": 1, "quick": False, "dtypes": ["float32"]}
    return json.loads(json.dumps({**head, "settings": {**base, **settings}, "launches": [launch], "cases": cases}))


def test_report_from_a_made_result(tmp_path, capsys):
    import report

    file = tmp_path / "made.json"
    file.write_text(json.dumps(made()))
    assert report.main([str(file)]) == 0
    text = (tmp_path / "made.md").read_text()
    assert "1.10 [1.09, 1.11]" in text and "**missed**" in text and "frozen 50%, masm 50%" in text
    assert "| broken | wrong | y 1 > 1e-05 |" in text and "needs the package peft" in text
    assert "| float32 M | masm |" in text and "M = 4: 1.50" in text
    for name in ("ratios", "summary", "roofline", "scale"):
        assert (tmp_path / f"made-{name}.png").read_bytes().startswith(b"\x89PNG")
    file.write_text("{}")
    assert report.main([str(file)]) == 2 and "not a result" in capsys.readouterr().err


def test_the_eager_loop_is_named_once_with_what_it_leaves_out():
    import bench
    import report
    from cases import Case

    outcome = bench.Outcome(Case("optimizer", "100% masked", "float32", "torch-fused", {"masked": 1.0}))
    loop = bench.statistics({"eager-loop": [0.5], "masm": [1.0]}, "eager-loop")
    outcome.add("step over eager-loop", loop, baseline="eager-loop")
    results = made()
    results["cases"] = json.loads(json.dumps({outcome.case.key: outcome.to_dict() | {"launch": 0}}))
    assert "**step**, ratio over eager-loop, which leaves out masked blocks" in report.markdown(results)


def test_compare_finds_what_moved_and_ignores_noise(tmp_path, capsys):
    import compare
    import run

    before, noise, faster = made(1.10, 0.04), made(1.11, 0.04), made(1.02, 0.04)
    assert compare.compare(before, noise)["moved"] == []
    [(case, measure, provider, old, new, change)] = compare.compare(before, faster)["moved"]
    assert (case, measure, provider) == ("layer/float32/8x8/R4", "forward+backward", "masm")
    assert (old, new) == pytest.approx((1.10, 1.02)) and change == pytest.approx(1.02 / 1.10 - 1)
    # narrow intervals do not make a change of 0.5% news
    assert compare.compare(made(1.1, 0.0), made(1.105, 0.0))["moved"] == []
    assert compare.compare(before, made(1.1, 0.04, threads=2))["warnings"] == ["threads: 1 and 2"]
    for name, results in (("a", before), ("b", faster)):
        (tmp_path / name).write_text(json.dumps(results))
    assert run.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "better layer/float32/8x8/R4 forward+backward masm: 1.100 -> 1.020 (-7.3%)" in out
    assert run.main(["--compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
