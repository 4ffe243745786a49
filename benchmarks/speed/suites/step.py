"""A whole training step of a vision transformer over the same model with every linear frozen."""

from __future__ import annotations

import torch
from bench import Call, Outcome, interleave, statistics
from cases import DTYPES, MODELS, STEP_GOALS, STEP_OVER_EFFORT, SUBSPACES, Case, Options, over
from masm_detect.gpu import Meter
from training import PROGRAMS, RANK, Program, gate_step


def cases(options: Options) -> list[Case]:
    size, which = MODELS[options.model], options.defaults.converted
    values = {"model": options.model, "batch": options.batch, "R": RANK, "K": SUBSPACES, "converted": which}
    values |= {"tokens": size.tokens, "linears": len(size.converted(which))}
    programs, device = names(options), "cuda" if options.on_gpu else "cpu"
    # every program is built twice, and on a GPU 96 weights are decomposed; on a CPU a step takes seconds
    set_up = 40.0 + 5.0 * len(programs) if options.on_gpu else 20.0 * len(programs)
    out = []
    for dtype in options.model_dtypes:
        goals = {("step", name): limit for name in ("masm", "masm-group") if (limit := STEP_GOALS.get((device, dtype)))}
        if options.on_gpu:
            goals |= {(over("step", "effort"), name): STEP_OVER_EFFORT for name in ("masm", "masm-group")}
        goals = {key: limit for key, limit in goals.items() if key[1] in programs}
        out.append(Case("step", options.model, dtype, "frozen", values, goals, 4 * options.seconds + set_up))
    return out


def names(options: Options, case: Case | None = None) -> list[str]:
    """The programs of a run. Those that the device leaves out, and in a quick run the compiler, which works for minutes
    on a whole model, run where they are named."""
    chosen = options.chosen(tuple(PROGRAMS), "frozen")
    if options.providers is not None:
        return chosen
    return [n for n in chosen if n not in options.defaults.left_out and not (options.quick and n == "compiled")]


def measure(case: Case, options: Options) -> Outcome:
    outcome, device, dtype = Outcome(case), torch.device(options.device), DTYPES[case.dtype]
    size, which = MODELS["tiny" if options.dry_run else case.values["model"]], case.values["converted"]
    programs: dict[str, Program] = {}
    for name in names(options):
        with outcome.provider(name):
            outcome.errors[name] = gate_step(name, size, dtype, device, 2, options.cache, which)
            if not options.dry_run:
                programs[name] = Program(name, size, dtype, device, case.values["batch"], options.cache, which=which)
    if options.dry_run:
        return outcome
    samples = interleave(
        {name: Call(program) for name, program in programs.items()},
        device,
        # A step takes twenty times as long as a layer: the same number of rounds needs a larger budget.
        4 * options.seconds,
        least=3 if options.quick else 5,
        warm_up=1,
        progress=case.key if options.progress else "",
        on_failure=outcome.fail,
    )
    entries = statistics(samples, case.baseline)
    for name, entry in entries.items():
        entry["images_per_second"] = case.values["batch"] / entry["median"]
        trained = [p for p in programs[name].model.parameters() if p.requires_grad]
        entry["trained_parameters"] = sum(p.numel() for p in trained)
    outcome.add("step", entries)
    ours = [name for name in ("masm", "masm-group") if name in samples]
    if options.on_gpu and ours and "effort" in samples:
        shown = {name: samples[name] for name in ("effort", *ours)}
        outcome.add(over("step", "effort"), statistics(shown, "effort"), baseline="effort")
    if device.type == "cuda":
        meter = Meter(device)
        outcome.extra["joules"] = {name: meter.joules(programs[name], device, 2.0) for name in entries}
        outcome.extra["clocks"] = meter.clocks()
    return outcome
