"""The tuner: what it proposes, and its run without a GPU. No test here asserts a time."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the tuner reads the tiles of the Triton kernels; Triton is not installed here")
pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")

from masm_ext.ops import strategies
from masm_ext.ops.strategies import ADDMM, FOLDED, KEXT, REFERENCE, SINGLE, STRATEGIES, STREAM, Call


def rows_with(best, dtype=torch.bfloat16):
    """Rows in which `best(call)` takes 1 second and every other strategy between 1.2 and 2."""
    out = []
    for M in (1, 64, 1028, 8224):
        for IN, OUT in ((1024, 1024), (4096, 1024), (1024, 4096)):
            for R in (16, 64):
                call = Call(M, OUT, IN, R, 1, dtype, 90)
                others = {name: 1.2 + 0.8 * float(torch.rand(())) for name in (KEXT, SINGLE, ADDMM, REFERENCE)}
                out.append((call, {**others, best(call): 1.0}))
    return out


def test_a_table_that_was_put_in_comes_out():
    from rules import losses, propose

    def best(call):
        if call.M <= 64:
            return SINGLE
        return ADDMM if call.OUT > 1024 and call.R > 16 else KEXT

    rows = rows_with(best) + rows_with(lambda call: REFERENCE, torch.float32)
    found = propose(rows)
    assert sum(proposal.rows for proposal in found) == len(rows)
    assert all(proposal.mean == proposal.worst == 0 for proposal in found)
    # the proposed code is a table of strategies.py that makes these choices
    from masm_ext.ops import strategies

    table = eval("(" + "".join(proposal.code("test") for proposal in found) + ")", {**vars(strategies)})

    def choose(call):
        return next(rule.strategy for rule in table if rule.when(call))

    assert all(loss == 0 for *_, loss in losses(rows, choose))
    worst = losses(rows, lambda call: KEXT)
    assert worst[0][3] == max(times[KEXT] for _, times in rows) - 1 and worst == sorted(worst, key=lambda row: -row[3])
    assert losses(rows, lambda call: FOLDED)[0][3] == float("inf")


def test_a_rule_for_stream_asks_whether_it_can_serve():
    from rules import Proposal

    line = Proposal(STREAM, "c.R <= 64", 3, 0.0, 0.0).code("measured")
    rule = eval(line.removesuffix(","), vars(strategies))
    call = Call(M=16, OUT=512, IN=512, R=16, layers=1, dtype=torch.float32, capability=90, cuda_library=True)
    assert rule.strategy == STREAM and rule.when(call)
    assert not rule.when(replace(call, M=256)) and not rule.when(replace(call, cuda_library=False))
    assert not rule.when(replace(call, R=65))


def test_a_small_gain_is_no_rule():
    from rules import propose

    rows = [(Call(M, 1024, 1024, 16, 1, torch.bfloat16, 90), {KEXT: 1.0, SINGLE: 1.0 + 0.001 * (M > 64)})
            for M in (1, 64, 1028, 8224)]  # fmt: skip
    [only] = propose(rows)
    assert (only.strategy, only.rows) == (KEXT, 4)


def test_without_a_gpu(capsys):
    import tune

    assert tune.main(["--dry-run", "--only", "M8224"]) == 0
    out = capsys.readouterr().out
    assert "tune/bfloat16/bfloat16/M8224/1024x1024/R16: about" in out and "27 cases" in out
    assert "tf32 backward, the formula against float64: dX" in out
    if not torch.cuda.is_available():
        assert "no GPU: nothing was built" in out
        assert tune.main([]) == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_model_can_be_asked(capsys):
    import tune

    assert tune.main(["--model", "a100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("modelled, A100: 648 calls") and "Rule(KEXT, lambda c: c.dtype != torch.float32" in out


@pytest.fixture
def stand_in(monkeypatch):
    """The CPU op in place of every strategy; `wrong`: strategies whose results are changed."""
    import run
    import tune

    right, describe, wrong = tune.Problem.run, run.describe, set()

    def any_strategy(self, part, strategy, ops=torch.ops.masm):
        found = right(self, part, "", ops)
        return tuple(t * 1.1 for t in found) if strategy in wrong else found

    monkeypatch.setattr(tune.Problem, "run", any_strategy)
    monkeypatch.setattr(tune, "TOKENS", (1, 20))
    monkeypatch.setattr(tune, "SHAPES", ((32, 48),))
    monkeypatch.setattr(tune, "RANKS", (8,))
    monkeypatch.setattr(tune, "SECONDS", 0.001)
    monkeypatch.setattr(run, "ceilings", lambda *_, **__: {})
    monkeypatch.setattr(tune._library, "CUDA_LIBRARY", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in 80GB")

    def described(device):
        record = describe(device)
        return record | {"device": record["device"] | {"name": "Stand-in", "capability": "9.0"}}

    monkeypatch.setattr(run, "describe", described)
    return wrong


def test_a_run_is_written_resumed_and_read(stand_in, tmp_path, capsys):
    import tune

    out = tmp_path / "tune.json"
    line = ["--device", "cpu", "--out", str(out)]
    assert tune.main([*line, "--minutes", "0.0001"]) == 0
    assert "--resume goes on with" in capsys.readouterr().err
    assert tune.main([*line, "--resume"]) == 0
    assert "measured, Stand-in: 18 calls" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert len(results["cases"]) == 6 and len(results["launches"]) == 2 and results["launches"][0]["git"] is not None
    case = results["cases"]["tune/bfloat16/bfloat16/M20/32x48/R8"]
    assert set(case["measures"]) == {"forward", "inference", "backward"}
    strategies = set(case["measures"]["backward"]["providers"])
    assert strategies == {"frozen", KEXT, SINGLE, ADDMM, REFERENCE}  # folding would round away what was learned
    exact = results["cases"]["tune/float32/float32/M20/32x48/R8"]["measures"]["backward"]["providers"]
    assert set(exact) == {"frozen", *STRATEGIES} - {STREAM}  # the library is not loaded
    rows = tune.rows_of(results)
    calls = {call for call, _ in rows}
    assert Call(20, 32, 48, 8, 1, torch.bfloat16, 90, True) in calls  # forward: N = 32 columns
    assert Call(20, 48, 32, 8, 1, torch.bfloat16, 90, True, backward=True) in calls  # dX: D = 48 columns
    assert Call(20, 32, 48, 8, 1, torch.float32, 90, False, True) in calls
    assert tune.main(["--report", str(out)]) == 0 and "Rule(" in capsys.readouterr().out
    assert str(tmp_path) not in out.read_text()


def test_a_wrong_strategy_is_refused_and_not_timed(stand_in, tmp_path, capsys):
    import tune

    stand_in.add(SINGLE)
    out = tmp_path / "tune.json"
    assert tune.main(["--device", "cpu", "--out", str(out), "--only", "bfloat16/M20"]) == 1
    [case] = json.loads(out.read_text())["cases"].values()
    assert set(case["refused"]) == {"forward single", "inference single", "backward single"}
    assert all(SINGLE not in table["providers"] for table in case["measures"].values())
    before = torch.backends.cuda.matmul.fp32_precision
    assert tune.main(["--device", "cpu", "--out", str(tmp_path / "other.json"), "--only", "tf32/M20"]) == 1
    assert torch.backends.cuda.matmul.fp32_precision == before
