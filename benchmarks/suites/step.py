"""A whole training step of a vision transformer over the same model with every linear frozen."""

from __future__ import annotations

import torch
from bench import Call, Outcome, interleave, statistics
from cases import DTYPES, MODELS, STEP_GOALS, SUBSPACES, Case, Options
from machine import Meter
from training import PROGRAMS, RANK, Program, gate_step


def cases(options: Options) -> list[Case]:
    values = {"model": options.model, "batch": options.batch, "R": RANK, "K": SUBSPACES}
    values |= {"tokens": MODELS[options.model].tokens, "linears": len(MODELS[options.model].linears)}
    chosen = options.chosen(tuple(PROGRAMS))
    return [
        Case(
            "step",
            options.model,
            dtype,
            "frozen",
            values,
            {("step", "masm"): STEP_GOALS[dtype]} if "masm" in chosen else {},
        )
        for dtype in options.dtypes
    ]


def names(options: Options) -> list[str]:
    """The programs of a run. A compiler works for minutes on a whole model: not in a quick run, unless named."""
    chosen = options.chosen(tuple(PROGRAMS), "frozen")
    return [n for n in chosen if n != "compiled" or not options.quick or options.providers is not None]


def measure(case: Case, options: Options) -> Outcome:
    outcome, device, dtype = Outcome(case), torch.device(options.device), DTYPES[case.dtype]
    size = MODELS["tiny" if options.dry_run else case.values["model"]]
    programs: dict[str, Program] = {}
    for name in names(options):
        with outcome.provider(name):
            outcome.errors[name] = gate_step(name, size, dtype, device, 2, options.cache)
            if not options.dry_run:
                programs[name] = Program(name, size, dtype, device, case.values["batch"], options.cache)
    if options.dry_run:
        return outcome
    samples = interleave(
        {name: Call(program) for name, program in programs.items()},
        device,
        # A step is twenty times a layer: the same number of rounds wants a larger budget.
        4 * options.seconds,
        least=3 if options.quick else 5,
        warm_up=1,
        progress=case.key if options.progress else "",
        on_failure=outcome.fail,
    )
    entries = statistics(samples, case.floor)
    for name, entry in entries.items():
        entry["images_per_second"] = case.values["batch"] / entry["median"]
        trained = [p for p in programs[name].model.parameters() if p.requires_grad]
        entry["trained_parameters"] = sum(p.numel() for p in trained)
    outcome.add("step", entries)
    if device.type == "cuda":
        meter = Meter(device)
        outcome.extra["joules"] = {name: meter.joules(programs[name], device, 2.0) for name in entries}
        outcome.extra["clocks"] = meter.clocks()
    return outcome
