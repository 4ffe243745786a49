"""A provider that is wrong, fails, is missing or cannot serve is listed with the reason, and the case goes on."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")
pytest.importorskip("transformers", reason="needs the extra masm_ext[detect]")


def test_a_refused_provider_is_listed_and_the_case_goes_on():
    import bench
    from cases import Case

    outcome = bench.Outcome(Case("layer", "x", "float32", "frozen", {}))
    for name, error in (("a", bench.GateError("y 1")), ("b", ImportError("needs b")), ("c", RuntimeError("broke"))):
        with outcome.provider(name):
            raise error
    assert (outcome.refused, outcome.unavailable) == ({"a": "y 1"}, {"b": "needs b"})
    assert outcome.failed == {"c": "RuntimeError: broke"} and not outcome.sound


def test_a_library_that_is_not_there_is_said_to_be_missing(repo):
    hidden = "import sys; sys.modules['eigentune'] = None; sys.path.insert(0, sys.argv.pop(1)); import run; "
    hidden += "sys.exit(run.main(sys.argv[1:]))"
    line = [sys.executable, "-c", hidden, repo / "benchmarks/speed", "--suite", "layer", "--dry-run", "--quick"]
    line += ["--dtypes", "float32", "--providers", "masm,compiled,eigentune"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "layer/float32/1024x1024/R16: 3 checked" in done.stdout  # frozen, masm, compiled
    assert "not here: eigentune: needs the package eigentune" in done.stdout


def test_a_strategy_cannot_be_forced_on_a_cpu(capsys):
    import run

    line = ["--suite", "layer", "--dry-run", "--quick", "--dtypes", "float32", "--providers", "masm,masm-kext"]
    assert run.main(line) == 0
    assert "not here: masm-kext: needs an NVIDIA GPU" in capsys.readouterr().out


def test_a_strategy_that_cannot_serve_is_left_out_with_the_words_of_the_op(layer_of, layer_case, monkeypatch):
    import bench
    import providers

    _, layer = layer_of("masm")
    x = torch.randn(5, 32)
    with pytest.raises(bench.Unavailable, match="strategy 'single'"):  # what the op says on a CPU
        providers.ForcedLinear(layer, "single")(x)
    assert torch.equal(providers.ForcedLinear(layer, "")(x), layer(x))
    formula = providers.MasmForced("single").formula(providers.ForcedLinear(layer, "single"))
    assert set(formula.trained) == {"u", "s", "v"} and formula.trained["u"] is layer.u

    def broken(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(providers, "subspace_linear", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        providers.ForcedLinear(layer, "single")(x)
    outcome = bench.Outcome(layer_case)
    with outcome.provider("masm-single"):
        raise bench.Unavailable("strategy 'single' serves R <= 64")
    assert outcome.unavailable == {"masm-single": "strategy 'single' serves R <= 64"} and outcome.sound
