"""The benchmark suite: its statistics, its gate, its files. No test here asserts a time."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")
pytest.importorskip("transformers", reason="needs the extra masm_ext[detect]")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def program(request):
    """The modules of benchmarks/ are importable by name, as they are for the scripts in it."""
    folder = str(request.config.rootpath / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


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
    launch = describe(CPU) | {"ceilings": top}
    head = {"format": store.FORMAT, "format_version": store.FORMAT_VERSION}
    base = {"device": "cpu", "threads": 1, "quick": False, "dtypes": ["float32"]}
    return json.loads(json.dumps({**head, "settings": {**base, **settings}, "launches": [launch], "cases": cases}))


def test_ratios_are_taken_inside_a_round():
    import bench

    # The machine is ten times slower in every third round: medians of the times cannot be compared, ratios can.
    slow = [10.0 if i % 3 == 0 else 1.0 for i in range(30)]
    samples = {"frozen": slow, "masm": [1.25 * x for x in slow]}
    entry = bench.statistics(samples, "frozen")["masm"]
    assert entry["ratio"] == pytest.approx({"median": 1.25, "p20": 1.25, "p80": 1.25})
    assert entry["rounds"] == 30 and entry["median"] == pytest.approx(1.25) and entry["p80"] == pytest.approx(12.5)
    assert "ratio" not in bench.statistics({"masm": [1.0]}, "frozen")["masm"]
    with pytest.raises(ValueError, match="every round"):
        bench.statistics({"frozen": [1.0, 1.0], "masm": [1.0]}, "frozen")


def test_quantiles_interpolate():
    import bench

    values = random.Random(0).sample(range(101), 101)
    assert bench.spread(values) == {"median": 50, "p20": 20, "p80": 80}
    assert bench.quantile([3.0], 0.2) == 3.0 and bench.quantile([0.0, 1.0], 0.25) == 0.25


def test_rounds_are_interleaved_and_failures_left_out():
    import bench

    order, failures = [], {}

    def broken():
        raise RuntimeError("no kernel")

    calls = {name: bench.Call(lambda name=name: order.append(name), lambda: None) for name in "abc"}
    calls["broken"] = bench.Call(broken)
    samples = bench.interleave(
        calls, CPU, 0.0, least=7, warm_up=2, on_failure=lambda n, e: failures.__setitem__(n, str(e))
    )
    assert failures == {"broken": "no kernel"} and {n: len(v) for n, v in samples.items()} == dict.fromkeys("abc", 7)
    rounds = [order[i : i + 3] for i in range(6, len(order), 3)]  # after two warm-up calls of each
    assert len(rounds) == 7 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.interleave({"broken": calls["broken"]}, CPU, 0.0)


def test_a_straight_line_is_found_and_a_bend_told():
    import bench

    x = [1, 2, 4, 8, 16]
    line = bench.fit_line(x, [3 + 2 * v for v in x])
    assert (line.intercept, line.slope) == pytest.approx((3, 2)) and line.residual < 1e-9
    bent = bench.fit_line(x, [3 + 2 * v + (40 if v == 8 else 0) for v in x])
    assert bent.residual > 0.2
    with pytest.raises(ValueError, match="three points"):
        bench.fit_line([1, 2], [1, 2])


def test_goals_know_noise():
    import bench

    assert bench.judge({"median": 1.0, "p20": 0.9, "p80": 1.05}, 1.1) == {"value": 1.0, "met": True, "clear": True}
    assert bench.judge({"median": 1.0, "p20": 0.9, "p80": 1.2}, 1.1) == {"value": 1.0, "met": True, "clear": False}
    assert bench.judge({"median": 1.2, "p20": 1.0, "p80": 1.3}, 1.1) == {"value": 1.2, "met": False, "clear": False}
    assert bench.judge({}, 1.1)["met"] is None


def test_saved_bytes_counts_a_storage_once():
    import bench

    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    assert bench.saved_bytes(lambda: (x.exp() * 2).sum(), [x]) == 8 * 16 * 4  # exp keeps its result
    assert bench.saved_bytes(lambda: (x * w).sum(), [x, w]) == 0
    assert bench.saved_bytes(lambda: (x * w).sum(), [w]) == 8 * 16 * 4


def layer_of(name, rank=4, subspaces=2, dtype=torch.float32):
    import providers
    from suites.layer import OneLayer

    model = OneLayer((torch.randn(24, 32) / 6).to(dtype), torch.randn(24).to(dtype))
    provider = providers.PROVIDERS[name]
    provider.adapt(model, ["linear"], providers.Setting(rank, subspaces))
    providers.stir(provider.formula(model.linear))
    return provider, model.linear


@pytest.mark.parametrize("mistake", ["scaled output", "no low-rank part", "detached factor", "NaN", "wrong dX"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_refuses_a_wrong_provider(mistake, dtype):
    import bench
    import providers

    provider, layer = layer_of("reference", dtype=dtype)
    x, dy = torch.randn(20, 32).to(dtype), torch.randn(20, 24).to(dtype)
    providers.gate(provider, layer, x, dy)  # it is right as it is
    right = type(layer).forward

    class Wrong(type(layer)):
        def forward(self, x):
            if mistake == "scaled output":
                return right(self, x) * 1.05
            if mistake == "no low-rank part":
                return nn.functional.linear(x, self.weight, self.bias)
            if mistake == "NaN":
                return right(self, x) + torch.tensor(float("nan"), dtype=x.dtype)
            if mistake == "wrong dX":
                return right(self, x.detach() + 0.9 * (x - x.detach()))
            low_rank = ((x.to(self.v.dtype) @ self.v.detach().mT) * self.s) @ self.u
            return nn.functional.linear(x, self.weight, self.bias) + low_rank.to(x.dtype)

    layer.__class__ = Wrong
    with pytest.raises(bench.GateError, match="differs from the float64 reference"):
        providers.gate(provider, layer, x, dy)


def test_the_gate_wants_no_gradient_of_masked_blocks():
    import bench
    import providers

    provider, layer = layer_of("masm")
    x, dy = torch.randn(20, 32), torch.randn(20, 24)
    layer.mask[1] = False
    assert set(providers.gate(provider, layer, x, dy)) == {"y", "dX", "du", "ds", "dv"}
    kept = layer.mask.clone()

    class Forgetful(type(layer)):  # computes masked gradients all the same
        def forward(self, x):
            self.mask.fill_(True)
            y = super().forward(x)
            self.mask = kept.clone()
            return y

    layer.__class__ = Forgetful
    layer.mask = kept.clone()
    with pytest.raises(bench.GateError, match="du"):
        providers.gate(provider, layer, x, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_of_a_step_refuses_one_wrong_layer(dtype, monkeypatch):
    import bench
    import providers
    import training
    from cases import MODELS

    training.gate_step("reference", MODELS["tiny"], dtype, CPU, 2)
    right = providers.Reference.adapt

    def wrong(self, model, names, setting):
        right(self, model, names, setting)
        layer = model.get_submodule(names[3])
        layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(providers.Reference, "adapt", wrong)
    with pytest.raises(bench.GateError, match="trained"):
        training.gate_step("reference", MODELS["tiny"], dtype, CPU, 2)


def test_half_of_the_blocks_are_masked_and_stay_so():
    import training
    from cases import MODELS

    program = training.Program("masm-half", MODELS["tiny"], torch.float32, CPU, 2)
    program()
    first = program.masks.masks.clone()
    assert first.mean() == 0.5 and first.mean(0).tolist() == [0.5] * 4
    for _ in range(3):
        program()
    assert torch.equal(program.masks.masks, first)


def test_the_optimizer_gate_refuses_a_wrong_step(monkeypatch):
    import bench
    from cases import MODELS
    from suites import optimizer

    shapes, values = MODELS["tiny"].linears[:2], {"K": 4, "masked": 0.5}
    optimizer.gate("eager-loop", shapes, values, 4, CPU)
    right = optimizer.EagerLoop.step

    def wrong(self):
        right(self)
        self.layers[0].s.data += 1e-5  # also moves masked blocks

    monkeypatch.setattr(optimizer.EagerLoop, "step", wrong)
    with pytest.raises(bench.GateError, match="AdamW in float64"):
        optimizer.gate("eager-loop", shapes, values, 4, CPU)


def test_a_refused_provider_is_listed_and_the_case_goes_on():
    import bench
    from cases import Case

    outcome = bench.Outcome(Case("layer", "x", "float32", "frozen", {}))
    for name, error in (("a", bench.GateError("y 1")), ("b", ImportError("needs b")), ("c", RuntimeError("broke"))):
        with outcome.provider(name):
            raise error
    assert (outcome.refused, outcome.unavailable) == ({"a": "y 1"}, {"b": "needs b"})
    assert outcome.failed == {"c": "RuntimeError: broke"} and not outcome.sound


@pytest.mark.parametrize("suite", ["layer", "group", "step", "optimizer", "losses", "decompose", "scale", "memory"])
def test_dry_run(suite, capsys):
    import run

    # A compiler works for seconds on each shape: it has a test of its own below.
    known = ",".join(name for name in run.known_providers() if name != "compiled")
    assert run.main(["--suite", suite, "--dry-run", "--threads", "1", "--providers", known]) == 0
    out = capsys.readouterr().out
    assert f"{suite}/" in out and "0 with a provider that is wrong or fails" in out


def test_a_library_that_is_not_there_is_said_to_be_missing(repo):
    hidden = "import sys; sys.modules['eigentune'] = None; sys.path.insert(0, sys.argv.pop(1)); import run; "
    hidden += "sys.exit(run.main(sys.argv[1:]))"
    line = [sys.executable, "-c", hidden, repo / "benchmarks", "--suite", "layer", "--dry-run", "--quick"]
    line += ["--dtypes", "float32", "--providers", "masm,compiled,eigentune"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "layer/float32/1024x1024/R16: 3 checked" in done.stdout  # frozen, masm, compiled
    assert "not here: eigentune: needs the package eigentune" in done.stdout


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
    assert {"suite", "dtype", "floor", "values", "measures", "goals", "errors", "refused", "launch"} <= set(case)
    entry = case["measures"]["step"]["providers"]["masm"]
    assert {"median", "p20", "p80", "rounds", "ratio", "bytes"} == set(entry) and entry["rounds"] >= 5
    launch = results["launches"][0]
    assert launch["ceilings"]["float32"]["flops"] > 0 and len(launch["libraries_sha256"]["libmasm_cpu.so"]) == 64
    assert str(tmp_path) not in out.read_text() and not list(tmp_path.glob(".*"))
    assert run.main([*line, "--resume"]) == 0 and "every case already" in capsys.readouterr().out


def test_report_from_a_made_result(tmp_path, capsys):
    import report

    file = tmp_path / "made.json"
    file.write_text(json.dumps(made()))
    assert report.main([str(file)]) == 0
    text = (tmp_path / "made.md").read_text()
    assert "1.10 [1.09, 1.11]" in text and "**missed**" in text and "frozen 50%, masm 50%" in text
    assert "| broken | wrong | y 1 > 1e-05 |" in text and "needs the package peft" in text
    assert "| float32 M | masm |" in text and "M = 4: 1.50" in text
    for name in ("bars", "roofline", "scale"):
        assert (tmp_path / f"made-{name}.png").read_bytes().startswith(b"\x89PNG")
    file.write_text("{}")
    assert report.main([str(file)]) == 2 and "not a result" in capsys.readouterr().err


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


def test_joules_of_a_call_are_its_share_of_the_counter(monkeypatch):
    from types import SimpleNamespace

    import machine

    class NVMLError(Exception):
        pass

    counter = iter([1_000_000, 1_006_000])  # millijoules before and after
    calls = []
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(machine, "synchronize", lambda device: None)
    device = torch.device("cuda")
    joules = machine.Meter(device).joules(lambda: calls.append(1), device, seconds=0.001)
    assert joules == pytest.approx(6.0 / len(calls))
    assert machine.Meter(CPU).joules(lambda: None, CPU) is None and machine.Meter(CPU).clocks() is None


def test_on_a_gpu_the_defaults_and_goals_are_those_of_a_gpu():
    from cases import GIBIBYTE, SUITES, Options
    from run import importlib

    options = Options(device="cuda:1")
    assert (options.model, options.batch, options.defaults.tokens) == ("vit-l", 32, 8224)
    cases = {case.key: case for name in SUITES for case in importlib.import_module(f"suites.{name}").cases(options)}
    both, forward = "forward+backward", "forward"
    for shape, limits in (("1024x1024", (1.12, 1.50)), ("4096x1024", (1.06, 1.27)), ("1024x4096", (1.10, 1.30))):
        case = cases[f"layer/bfloat16/{shape}/R16"]
        assert case.values["M"] == 8224 and (case.goals[forward, "masm"], case.goals[both, "masm"]) == limits
        assert case.goals[f"{both} over effort", "masm"] == 1 / 1.4
        assert case.goals[f"{both} over peft-lora", "masm"] == 1 / 1.2
    step, memory = cases["step/bfloat16/vit-l"], cases["memory/bfloat16/vit-l"]
    assert step.values["converted"] == "attention" and step.values["linears"] == 96
    assert step.goals["step", "masm"] == 1.10 and step.goals["step over effort", "masm"] == 1 / 1.3
    assert memory.goals["step memory over effort", "masm"] == 0.8
    assert {case.values["M"] for key, case in cases.items() if key.startswith("layer")} == {1, 16, 8224}
    few = cases["layer/bfloat16/4096x1024/R16/M16"]
    assert few.goals == {(f"{forward} over reference", "masm"): 1 / 1.8}
    optimizer, large = (cases[f"optimizer/float32/{name}"] for name in ("vit-l/0% masked", "1 GiB of moments"))
    assert optimizer.values["linears"] == 96 and optimizer.goals["step", "masm"] == 1.1
    assert optimizer.goals["step over eager-loop", "masm"] == 1 / 5
    shapes, R = GIBIBYTE
    assert large.values["R"] == R and abs(8 * R * sum(N + D + 1 for N, D in shapes) / 2**30 - 1) < 0.01
    # asked for, any dtype runs; on a CPU everything is as it was
    named = importlib.import_module("suites.step").cases(Options(device="cuda", model_dtypes=("float32",)))
    assert [case.dtype for case in named] == ["float32"]
    assert Options().defaults.tokens == 2056 and Options().model == "vit-s" and Options().batch == 16


def test_a_strategy_cannot_be_forced_on_a_cpu(capsys):
    import run

    line = ["--suite", "layer", "--dry-run", "--quick", "--dtypes", "float32", "--providers", "masm,masm-kext"]
    assert run.main(line) == 0
    assert "not here: masm-kext: needs an NVIDIA GPU" in capsys.readouterr().out


def test_a_strategy_that_cannot_serve_is_left_out_with_the_words_of_the_op(monkeypatch):
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
    outcome = bench.Outcome(layer_case())
    with outcome.provider("masm-single"):
        raise bench.Unavailable("strategy 'single' serves R <= 64")
    assert outcome.unavailable == {"masm-single": "strategy 'single' serves R <= 64"} and outcome.sound


def layer_case(**goals):
    from cases import Case

    return Case("layer", "24x32/R4", "float32", "frozen", {"M": 20, "N": 24, "D": 32, "R": 4, "K": 2}, goals)


def test_goals_over_a_peer_are_measured_in_the_same_rounds():
    from cases import BOTH, Case, Options, over
    from suites import layer

    case = Case(**{**vars(layer_case()), "goals": {(over(BOTH, "effort"), "masm"): 100.0, (BOTH, "masm"): 100.0}})
    outcome = layer.measure(case, Options(threads=1, seconds=0.01, providers=("masm", "effort")))
    assert outcome.sound and set(outcome.measures) == {"forward", BOTH, over(BOTH, "effort")}
    table = outcome.measures[over(BOTH, "effort")]
    assert table["floor"] == "effort" and set(table["providers"]) == {"effort", "masm"}
    rows = {name: outcome.measures[BOTH]["providers"][name]["median"] for name in ("effort", "masm")}
    assert table["providers"]["masm"]["median"] == rows["masm"]
    assert [goal["met"] for goal in outcome.to_dict()["goals"]] == [True, True]


def test_the_group_suite_runs_and_its_gate_sees_swapped_layers(monkeypatch):
    import bench
    import providers
    from cases import Case, Options
    from suites import group

    values = {"M": 20, "N": 24, "D": 32, "R": 4, "K": 2, "layers": 3}
    case = Case("group", "3 x 24x32/R4", "float32", "frozen", values)
    outcome = group.measure(case, Options(threads=1, seconds=0.01))
    assert outcome.sound and set(outcome.measures["forward"]["providers"]) == {"frozen", "masm", "masm-group"}
    assert set(outcome.errors["masm-group"]) == {"y", "dX", "du", "ds", "dv"}

    weights, biases = [torch.randn(24, 32) / 6 for _ in range(3)], [torch.randn(24) for _ in range(3)]
    model = group.Projections(weights, biases)
    providers.PROVIDERS["masm"].adapt(model, list(group.NAMES), providers.Setting(4, 2))
    assert group.group_projections(model) == 1
    formulas = [providers.PROVIDERS["masm"].formula(getattr(model, name)) for name in group.NAMES]
    x, dys = torch.randn(20, 32), [torch.randn(20, 24) for _ in range(3)]
    group.gate(model, formulas, x, dys)
    with pytest.raises(bench.GateError, match="differs from the float64 reference"):
        group.gate(model, formulas[::-1], x, dys)


def test_a_slow_first_call_is_in_no_sample(monkeypatch):
    """Kernels are compiled, and tiles timed, by the first call."""
    import time

    import bench

    monkeypatch.setattr(bench.Clock, "__init__", lambda self, device, ahead=False: vars(self).update(
        ahead=ahead, host={}, _flush=None))  # fmt: skip
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.05)

    samples = bench.interleave({"a": bench.Call(call)}, torch.device("cuda"), 0.0, least=6, warm_up=1)
    assert len(calls) == 2 + 6 and max(samples["a"]) < 0.05  # on CUDA two warm-ups, and one call a sample


def test_the_host_is_ahead_of_the_gpu(monkeypatch):
    import time

    import bench

    seen = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            seen.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append(cycles))
    clock, call = bench.Clock(CPU, ahead=True), bench.Call(lambda: (seen.append("run"), time.sleep(0.01)))
    clock._flush = torch.ones(4)
    assert clock.seconds(call) == 2e-3 and seen == [0, "record", "run", "record"] and not clock._flush.any()
    seen.clear()
    host = clock.host[call]
    clock.seconds(call)
    # the GPU sleeps longer than the host needs to launch the call, as far as it is known
    assert host >= 0.01 and seen[0] >= host * 2e9 and seen[1:] == ["record", "run", "record"]
    clock.host[call] = 30.0  # a first run that compiled: the GPU does not wait for another
    seen.clear()
    clock.seconds(call)
    assert seen[0] <= bench.LONGEST_WAIT * bench.FASTEST_CLOCK and clock.host[call] < 1
    seen.clear()
    plain = bench.Clock(CPU)
    plain._flush = torch.ones(4)
    plain.seconds(call)
    assert seen == ["record", "run", "record"]


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


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["layer", "group", "step", "optimizer", "losses", "scale"])
def test_dry_run_on_a_gpu(suite, capsys):
    import run

    known = ",".join(name for name in run.known_providers() if name != "compiled")
    assert run.main(["--suite", suite, "--device", "cuda", "--dry-run", "--quick", "--providers", known]) == 0
    assert "0 with a provider that is wrong or fails" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    import run

    for wrong in (["--providers", "lora"], ["--dtypes", "float8"], ["--device", "tpu"], ["--suite", "speed"]):
        with pytest.raises(SystemExit) as error:
            run.main(["--suite", "layer", *wrong])
        assert error.value.code == 2 and wrong[1] in capsys.readouterr().err


def test_memory_is_measured_in_a_process_of_its_own():
    from concurrent.futures import ProcessPoolExecutor
    from dataclasses import asdict
    from multiprocessing import get_context

    from cases import Options
    from suites import memory

    settings = asdict(Options(threads=1))
    values = {"model": "tiny", "batch": 2, "steps": 1, "converted": "all linears"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        rows = {n: pool.submit(memory.child, n, values, "float32", settings).result() for n in ("frozen", "masm")}
    for row in rows.values():
        assert row["process peak"] > row["step memory"] > 0
    assert rows["masm"]["saved"] > rows["frozen"]["saved"] > 0
