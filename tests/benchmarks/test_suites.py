"""What the suites measure: sizes and goals of a GPU, peers in the same rounds, masks, memory."""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")
pytest.importorskip("transformers", reason="needs the extra masm_ext[detect]")
CPU = torch.device("cpu")


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
    # requested, any dtype runs; on a CPU everything is as it was
    named = importlib.import_module("suites.step").cases(Options(device="cuda", model_dtypes=("float32",)))
    assert [case.dtype for case in named] == ["float32"]
    assert Options().defaults.tokens == 2056 and Options().model == "vit-s" and Options().batch == 16


def test_goals_over_a_peer_are_measured_in_the_same_rounds(layer_case):
    from cases import BOTH, Options, over
    from suites import layer

    case = replace(layer_case, goals={(over(BOTH, "effort"), "masm"): 100.0, (BOTH, "masm"): 100.0})
    outcome = layer.measure(case, Options(threads=1, seconds=0.01, providers=("masm", "effort")))
    assert outcome.sound and set(outcome.measures) == {"forward", BOTH, over(BOTH, "effort")}
    table = outcome.measures[over(BOTH, "effort")]
    assert table["baseline"] == "effort" and set(table["providers"]) == {"effort", "masm"}
    rows = {name: outcome.measures[BOTH]["providers"][name]["median"] for name in ("effort", "masm")}
    assert table["providers"]["masm"]["median"] == rows["masm"]
    assert [goal["met"] for goal in outcome.to_dict()["goals"]] == [True, True]


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
