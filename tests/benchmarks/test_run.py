"""The command line of run.py, and the files that it writes."""

import json

import pytest
import torch

pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")
pytest.importorskip("transformers", reason="needs the extra masm_ext[detect]")


@pytest.mark.parametrize("suite", ["layer", "group", "step", "optimizer", "losses", "decompose", "scale", "memory"])
def test_dry_run(suite, capsys):
    import run

    # A compiler works for seconds on each shape: it has a test of its own below.
    known = ",".join(name for name in run.known_providers() if name != "compiled")
    assert run.main(["--suite", suite, "--dry-run", "--threads", "1", "--providers", known]) == 0
    out = capsys.readouterr().out
    assert f"{suite}/" in out and "0 with a provider that is wrong or fails" in out


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["layer", "group", "step", "optimizer", "losses", "scale"])
def test_dry_run_on_a_gpu(suite, capsys):
    import run

    known = ",".join(name for name in run.known_providers() if name != "compiled")
    assert run.main(["--suite", suite, "--device", "cuda", "--dry-run", "--quick", "--providers", known]) == 0
    assert "0 with a provider that is wrong or fails" in capsys.readouterr().out


def test_without_a_gpu_cuda_is_listed_only(capsys):
    import run

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run.main(["--suite", "all", "--device", "cuda", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "layer/bfloat16/1024x1024/R16: about" in out and "masm-kext, masm-single, masm-addmm, masm-folded" in out
    assert "20 cases, about 9 minutes on cuda, a guess" in out and "no GPU: nothing was built" in out
    assert run.main(["--suite", "layer", "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_a_run_is_written_case_by_case_and_resumed(tmp_path, monkeypatch, capsys):
    import run
    import store
    from suites import optimizer

    out = tmp_path / "o.json"
    line = ["--suite", "optimizer", "--quick", "--seconds", "0.01", "--providers", "masm", "--threads", "1"]
    line += ["--out", str(out)]
    measure, seen = optimizer.measure, []

    def interrupted(case, options):
        seen.append(case.key)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(case, options)

    monkeypatch.setattr(optimizer, "measure", interrupted)
    assert run.main(line) == 130 and "--resume" in capsys.readouterr().err
    assert list(json.loads(out.read_text())["cases"]) == seen[:1]
    assert run.main(line) == 2 and "--resume" in capsys.readouterr().err  # nothing is overwritten
    assert run.main([*line, "--resume", "--batch", "3"]) == 2 and "batch" in capsys.readouterr().err
    assert run.main([*line, "--resume"]) == 0
    assert len(seen) == 4 and seen[1] == seen[2]
    results = store.load_results(out)
    assert len(results["cases"]) == 3 and len(results["launches"]) == 2
    case = results["cases"][seen[-1]]
    assert {"suite", "dtype", "baseline", "values", "measures", "goals", "errors", "refused", "launch"} <= set(case)
    entry = case["measures"]["step"]["providers"]["masm"]
    assert {"median", "p20", "p80", "rounds", "ratio", "bytes"} == set(entry) and entry["rounds"] >= 5
    launch = results["launches"][0]
    assert launch["ceilings"]["float32"]["flops"] > 0 and len(launch["libraries_sha256"]["libmasm_cpu.so"]) == 64
    assert str(tmp_path) not in out.read_text() and not list(tmp_path.glob(".*"))
    assert run.main([*line, "--resume"]) == 0 and "every case already" in capsys.readouterr().out


def test_a_run_stops_in_time(tmp_path, capsys):
    import run

    out = tmp_path / "o.json"
    line = ["--suite", "optimizer", "--quick", "--seconds", "0.01", "--providers", "masm", "--threads", "1"]
    line += ["--out", str(out)]
    assert run.main([*line, "--minutes", "0.001"]) == 0
    captured = capsys.readouterr()
    assert "not measured within 0.001 minutes; --resume goes on with optimizer/float32/vit-s/50% masked" in captured.err
    assert len(json.loads(out.read_text())["cases"]) == 1  # one is always measured, or a run would get nowhere
    assert run.main([*line, "--resume"]) == 0
    assert len(json.loads(out.read_text())["cases"]) == 3


def test_a_line_says_what_a_ratio_is_over_and_a_reason_once():
    import bench
    import run
    from cases import Case

    for share, over in ((0.5, "step over eager-loop:"), (1.0, "every block is masked):")):
        case = Case("optimizer", f"{share:.0%} masked", "float32", "torch-fused", {"masked": share})
        outcome = bench.Outcome(case, unavailable={"a": "needs x", "b": "needs y", "c": "needs x"})
        outcome.add("step", bench.statistics({"torch-fused": [2.0], "masm": [1.0]}, "torch-fused"))
        loop = bench.statistics({"eager-loop": [0.5], "masm": [1.0]}, "eager-loop")
        outcome.add("step over eager-loop", loop, baseline="eager-loop")
        first, second = run._summary(outcome).split("; ")
        assert first == "step over torch-fused: masm 0.50"
        assert second.startswith("step over eager-loop") and second.count("eager-loop") == 1
        assert second.endswith(f"{over} masm 2.00")
        assert run._notes(outcome) == ["not here: a, c: needs x", "not here: b: needs y"]


def test_unknown_names_are_refused(capsys):
    import run

    for wrong in (["--providers", "lora"], ["--dtypes", "float8"], ["--device", "tpu"], ["--suite", "speed"]):
        with pytest.raises(SystemExit) as error:
            run.main(["--suite", "layer", *wrong])
        assert error.value.code == 2 and wrong[1] in capsys.readouterr().err
