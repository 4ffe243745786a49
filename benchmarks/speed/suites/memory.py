"""Peak memory of a training step over the frozen model; on a CPU each provider in a process of its own."""

from __future__ import annotations

import gc
import importlib.util
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch
from bench import Outcome, saved_bytes, single
from cases import DTYPES, MEMORY_GOAL, MEMORY_OVER_EFFORT, MODELS, SUBSPACES, Case, Options, over
from peak_memory import peak_bytes, reset_peak, resident_bytes
from training import RANK, Program, gate_step

from masm_ext.progress import Progress
from suites import step

STEPS = 1


def cases(options: Options) -> list[Case]:
    which = options.defaults.converted
    values = {"model": options.model, "batch": options.batch, "R": RANK, "K": SUBSPACES, "steps": STEPS}
    values["converted"] = which
    chosen = names(options)
    limit, measure_name = MEMORY_GOAL, "step memory"
    if options.on_gpu:
        limit, measure_name = MEMORY_OVER_EFFORT, over("step memory", "effort")
    goals = {(measure_name, name): limit for name in ("masm", "masm-recompute") if name in chosen}
    dtypes = options.model_dtypes[:1] if options.quick else options.model_dtypes
    estimate = len(chosen) * (6.0 if options.on_gpu else 15.0)
    return [Case("memory", options.model, dtype, "frozen", values, goals, estimate) for dtype in dtypes]


def names(options: Options, case: Case | None = None) -> list[str]:
    """As for a step, but a compiler takes longer than all others together, and saves what it likes: only if named."""
    return [n for n in step.names(options) if n != "compiled" or options.providers is not None]


def measure(case: Case, options: Options) -> Outcome:
    """Measures: "process peak" is all of the process; "step memory" the peak less what the process held before there
    was a model: weights, gradients, optimizer state, activations; "saved" what autograd keeps between the passes.
    """
    outcome = Outcome(case)
    size = MODELS["tiny" if options.dry_run else case.values["model"]]
    device, dtype = torch.device(options.device), DTYPES[case.dtype]
    rows: dict[str, dict[str, Any]] = {}
    which = case.values["converted"]
    for name in Progress(names(options), desc=case.key, unit="program", leave=False, disable=not options.progress):
        with outcome.provider(name):
            outcome.errors[name] = gate_step(name, size, dtype, device, 2, options.cache, which)
            if options.dry_run:
                continue
            if device.type == "cuda":
                gc.collect()  # the counter starts from what is allocated: nothing of the last program may be
                rows[name] = child(name, case.values, case.dtype, asdict(options))
                continue
            # A new process for each: what one leaves in the heap must not be the other's peak.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows[name] = pool.submit(child, name, case.values, case.dtype, asdict(options)).result()
    if rows:
        for measure_name in ("step memory", "process peak", "saved"):
            baseline = rows.get(case.baseline, {}).get(measure_name)
            known = {n: row[measure_name] for n, row in rows.items() if row[measure_name] is not None}
            outcome.add(measure_name, {n: single(value, baseline) for n, value in known.items()}, "bytes")
        if options.on_gpu and "effort" in rows:
            baseline = rows["effort"]["step memory"]
            shown = {
                n: single(row["step memory"], baseline) for n, row in rows.items() if n.startswith(("masm", "effort"))
            }
            outcome.add(over("step memory", "effort"), shown, "bytes", baseline="effort")
        outcome.extra["method"] = {name: row["method"] for name, row in rows.items()}
    return outcome


def child(name: str, values: dict[str, Any], dtype: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Bytes of each measure, and how the peak was read; on a CPU in a process of its own."""
    options = Options(**settings)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Every process has the same libraries in memory, whichever it needs; those that are not installed are no matter.
    for package in ("transformers", "peft", "eigentune"):
        if importlib.util.find_spec(package):
            importlib.import_module(package)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.zeros(1, device=device)
    before = resident_bytes(device)
    size = MODELS[values["model"]]
    program = Program(name, size, DTYPES[dtype], device, values["batch"], options.cache, which=values["converted"])
    program()  # the first step makes the gradients' and the optimizer's memory
    method = reset_peak(device)
    for _ in range(values["steps"]):
        program()
    peak = peak_bytes(device)
    known = [*program.model.parameters(), *program.model.buffers(), program.images]
    # recompute_inputs decides with the same hooks that the count would need
    saved = None if program.kind.recompute else saved_bytes(program.loss, known)
    return {"step memory": peak - before, "process peak": peak, "saved": saved, "method": method}
