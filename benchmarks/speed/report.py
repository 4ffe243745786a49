"""Tables and plots of a result file of run.py.

    python benchmarks/speed/report.py benchmarks/speed/results/all-cpu.json [--out FOLDER]

Writes NAME.md and, where the suites are in it, NAME-ratios.png and NAME-summary.png (ratios over the baseline),
NAME-roofline.png and NAME-scale.png, beside the JSON file or into FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cases import BOTH, SUITES
from masm_detect.report.plots import new_figure, save_figure
from masm_detect.results import ResultError, write_text
from matplotlib.figure import Figure
from store import load_results

Results = dict[str, Any]
_TITLES = {
    "layer": "One layer",
    "group": "Three layers on one x",
    "step": "Training step",
    "memory": "Memory of a training step",
    "optimizer": "Optimizer step",
    "losses": "Losses",
    "decompose": "Conversion and loading",
    "scale": "Scaling",
}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="folder (default: that of the file)")
    asked = parser.parse_args(arguments)
    try:
        results = load_results(asked.file)
    except ResultError as error:
        print(error, file=sys.stderr)
        return 2
    folder = asked.out or asked.file.parent
    text = markdown(results)
    write_text(folder / f"{asked.file.stem}.md", text)
    plots = {
        "ratios": plot_ratios,
        "summary": lambda results: plot_ratios(results, most=3),
        "roofline": plot_roofline,
        "scale": plot_scale,
    }
    for name, draw in plots.items():
        figure = draw(results)
        if figure is not None:
            save_figure(figure, folder / f"{asked.file.stem}-{name}.png", dpi=110)
    print(text)
    return 0


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [conditions(results), goals_table(results)]
    for suite in SUITES:
        cases = _of(results, suite)
        if cases:
            parts.append(f"## {_TITLES[suite]}\n\n" + "\n\n".join(_suite_tables(suite, cases, results)))
    parts.append(left_out(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(results: Results) -> str:
    """With what the numbers were made."""
    lines = []
    for i, launch in enumerate(results["launches"]):
        device, git, packages = launch["device"], launch["git"], launch["packages"]
        flags = ", ".join(launch["cpu"]["flags"])
        commit = "no git" if git is None else f"{git['commit'][:10]}{' with changes' if git['modified'] else ''}"
        load = ", ".join(f"{x:.1f}" for x in launch["load_average"])
        versions = ", ".join(
            f"{n} {packages[n]}" for n in ("torch", "transformers", "peft", "eigentune") if n in packages
        )
        lines.append(
            f"- {f'launch {i + 1}: ' if len(results['launches']) > 1 else ''}{device['name']}, "
            f"{launch['threads']} threads, {flags}; {versions}; commit {commit}; {launch['time_utc']}; "
            f"load average at the start {load}"
        )
        for dtype, top in launch.get("ceilings", {}).items():
            lines.append(
                f"- {dtype}: a plain product reaches {top['flops'] / 1e9:.0f} GFLOP/s ({top['gemm']}), a plain copy "
                f"{top['bytes'] / 1e9:.1f} GB/s"
            )
    intro = (
        "Ratios are over the baseline of the same round: median [p20, p80] of the rounds. A "
        "provider that differs from the float64 reference is not timed. *noise*: p80 over p20 of the "
        "baseline itself; ratios of a noisy case say little."
    )
    quick = "\n\n**A quick run: small counts, to see that it works. Not a measurement.**" if _quick(results) else ""
    return "# Benchmark\n\n" + "\n".join(lines) + f"\n\n{intro}{quick}"


def goals_table(results: Results) -> str:
    """Every goal, met or missed; "within noise" where p20-p80 lies on both sides of it."""
    rows = []
    for key, case in results["cases"].items():
        for goal in case["goals"]:
            verdict = "not measured"
            if goal["met"] is not None:
                verdict = ("met" if goal["met"] else "**missed**") + ("" if goal["clear"] else ", within noise")
            value = "-" if goal["value"] is None else f"{goal['value']:.3f}"
            what = f"{goal['measure']}, {goal['provider']}"
            rows.append([f"{key}", what, f"<= {goal['limit']:.3g}", value, verdict])
    return "## Goals\n\n" + _table(["case", "what", "goal", "value", ""], rows) if rows else ""


def left_out(results: Results) -> str:
    """Providers without numbers, and why."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for key, case in results["cases"].items():
        for kind, word in (("refused", "wrong"), ("failed", "failed"), ("unavailable", "not here")):
            for provider, reason in case[kind].items():
                reasons.setdefault((provider, word, reason), []).append(key)
    if not reasons:
        return ""
    rows = [[p, word, reason, ", ".join(keys)] for (p, word, reason), keys in reasons.items()]
    return "## Not measured\n\n" + _table(["provider", "", "reason", "cases"], rows)


def _suite_tables(suite: str, cases: dict[str, Any], results: Results) -> Iterable[str]:
    if suite == "scale":
        yield _scale_lines(cases)
    measures = list(dict.fromkeys(m for case in cases.values() for m in case["measures"]))
    if suite == "scale":
        rows = []
        for key, case in cases.items():
            points = ((m, table["providers"].get("masm", {})) for m, table in case["measures"].items())
            rows.append([_short(key), ", ".join(f"{m}: {e['ratio']['median']:.2f}" for m, e in points if "ratio" in e)])
        yield "masm over the frozen layers at each point:\n\n" + _table(["sweep", "ratio"], rows)
        return
    for measure in measures:
        shown = {key: case["measures"][measure] for key, case in cases.items() if measure in case["measures"]}
        providers = list(dict.fromkeys(p for table in shown.values() for p in table["providers"]))
        baseline = next(iter(shown.values()))["baseline"]
        ratios, absolutes = [], []
        for key, table in shown.items():
            entries = [table["providers"].get(p) for p in providers]
            base = table["providers"].get(baseline)
            sampled = base is not None and base["rounds"] > 1
            trust = [str(base["rounds"]), f"{base['p80'] / base['p20'] - 1:.0%}"] if sampled else ["1", "-"]
            ratios.append(
                [_short(key), *("1" if p == baseline else _ratio(e) for p, e in zip(providers, entries)), *trust]
            )
            absolutes.append([_short(key), *(_absolute(e, table["unit"]) for e in entries)])
        title = f"**{measure.removesuffix(f' over {baseline}')}**, ratio over {baseline}"
        if baseline == "eager-loop":
            title += ", which leaves out masked blocks: with 100% masked it does nothing, and the ratio says nothing"
        yield f"{title}\n\n" + _table(["case", *providers, "rounds", "noise"], ratios)
        yield f"{measure}, itself\n\n" + _table(["case", *providers], absolutes)
    if suite in ("layer", "optimizer"):
        yield _share_of_ceiling(cases, results, BOTH if suite == "layer" else "step")
    if any("host_seconds" in case["extra"] for case in cases.values()):
        yield _on_the_gpu(cases)
    if suite == "step":
        yield _images(cases)


def _on_the_gpu(cases: dict[str, Any]) -> str:
    """What else is known of a call on a GPU: the time of the host, which the tables above leave out, memory, energy."""
    rows = []
    for key, case in cases.items():
        extra = case["extra"]
        for provider, host in extra.get("host_seconds", {}).items():
            peak, joules = (extra.get(name, {}).get(provider) for name in ("peak_bytes", "joules"))
            rows.append(
                [
                    *(_short(key), provider, f"{host * 1e6:.0f} us"),
                    "-" if peak is None else f"{peak / 2**20:.1f} MiB",
                    "-" if joules is None else f"{joules * 1e3:.2f} mJ",
                ]
            )
    text = f"{BOTH}: the host's time to launch it (not in the tables above), peak memory over what was there, energy"
    return f"{text}\n\n" + _table(["case", "provider", "host", "memory", "energy"], rows)


def _share_of_ceiling(cases: dict[str, Any], results: Results, measure: str) -> str:
    rows = []
    for key, case in cases.items():
        top = results["launches"][case["launch"]].get("ceilings", {}).get(case["dtype"])
        table = case["measures"].get(measure, {}).get("providers", {})
        for quantity, unit in (("flops", "FLOP/s"), ("bytes", "bytes/s")):
            shares = [f"{p} {e[quantity] / top[quantity]:.0%}" for p, e in table.items() if top and quantity in e]
            if shares:
                rows.append([_short(key), unit, ", ".join(shares)])
    text = (
        f"{measure}: FLOP and bytes that the formula needs, a second, over what a plain product and a plain copy reach"
    )
    return f"{text}\n\n" + _table(["case", "", "share"], rows)


def _images(cases: dict[str, Any]) -> str:
    rows = []
    for key, case in cases.items():
        for provider, e in case["measures"].get("step", {}).get("providers", {}).items():
            rows.append([_short(key), provider, f"{e['images_per_second']:.2f}", f"{e['trained_parameters']:,}"])
    return _table(["case", "provider", "images/s", "trained parameters"], rows)


def _scale_lines(cases: dict[str, Any]) -> str:
    rows = []
    for key, case in cases.items():
        for provider, line in case["extra"].get("lines", {}).items():
            verdict = "straight" if line["straight"] else f"**not straight** (at {line['worst']:g})"
            numbers = [f"{line['intercept'] * 1e3:.3f}", f"{line['slope'] * 1e6:.3f}", f"{line['residual']:.1%}"]
            rows.append([_short(key), provider, *numbers, verdict])
    head = ["sweep", "layer", "at 0, ms", "slope, us a unit", "largest distance", ""]
    return "Forward and backward against a straight line (least squares on relative errors)\n\n" + _table(head, rows)


def _ratio(entry: dict[str, Any] | None) -> str:
    if entry is None or "ratio" not in entry:
        return "-"
    ratio = entry["ratio"]
    digits = 2 if ratio["median"] < 10 else 0
    if ratio["p20"] == ratio["p80"]:
        return f"{ratio['median']:.{digits}f}"
    return f"{ratio['median']:.{digits}f} [{ratio['p20']:.{digits}f}, {ratio['p80']:.{digits}f}]"


def _absolute(entry: dict[str, Any] | None, unit: str) -> str:
    if entry is None:
        return "-"
    value = entry["median"]
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _of(results: Results, suite: str) -> dict[str, Any]:
    return {key: case for key, case in results["cases"].items() if case["suite"] == suite}


def _short(key: str) -> str:
    return key.partition("/")[2].replace("/", " ", 1)


def _quick(results: Results) -> bool:
    return bool(results["settings"].get("quick"))


#: What the panels call a provider.
TITLES = {"reference": "plain PyTorch", "compiled": "torch.compile", "effort": "Effort", "peft-lora": "PEFT LoRA",
          "peft-pissa": "PEFT PiSSA", "peft-osf": "PEFT OSF", "masm": "MASM",
          "masm-peft": "MASM, PEFT"}  # fmt: skip


def plot_ratios(results: Results, most: int | None = None) -> Figure | None:
    """Ratio over the baseline of each provider: one panel a case of layer, group and step; a dot is the median of the
    rounds, a line their 20th to 80th percentile. None if there is no such case.

    most: at most so many panels, the first case of each suite and dtype.
    """
    panels = [
        (suite, key, case["measures"][measure]["providers"], case)
        for suite, measure in (("layer", BOTH), ("group", BOTH), ("step", "step"))
        for key, case in _of(results, suite).items()
        if measure in case["measures"]
    ]
    if most is not None:
        first: dict[tuple[str, str], Any] = {}
        for panel in panels:
            first.setdefault((panel[0], panel[-1]["dtype"]), panel)
        panels = [panel for (suite, _), panel in first.items() if suite != "group"][:most]
    if not panels:
        return None
    figure, axes = _figure(len(panels), (4.2, 2.9))
    for ax, (_, key, table, case) in zip(axes, panels):
        shown = {p: e["ratio"] for p, e in table.items() if "ratio" in e and p != case["baseline"]}
        for place, (name, ratio) in enumerate(shown.items()):
            color = "tab:green" if name.startswith("masm") else "tab:gray"
            ax.plot([ratio["p20"], ratio["p80"]], [place, place], color=color, linewidth=1.2, alpha=0.7)
            ax.plot(ratio["median"], place, "o", color=color, markersize=5)
        ax.set_yticks(range(len(shown)), [TITLES.get(name, name) for name in shown])
        ax.invert_yaxis()
        ax.axvline(1, color="black", linewidth=0.8)
        for goal in case["goals"]:
            if goal["provider"] == "masm":
                ax.axvline(goal["limit"], color="tab:green", linestyle=":", linewidth=1)
        ax.set_title(key.replace("/", ", "), fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", alpha=0.3)
        ax.set_xlabel(f"time over {case['baseline']} (1: no cost)", fontsize=8)
    figure.supxlabel("dot: median of the rounds; line: 20th to 80th percentile; dotted: goal of MASM", fontsize=8)
    return figure


def plot_roofline(results: Results) -> Figure | None:
    """FLOP/s against FLOP a byte of the suite layer, under the measured ceilings; one panel a dtype."""
    cases = _of(results, "layer")
    tops = {c["dtype"]: results["launches"][c["launch"]].get("ceilings", {}).get(c["dtype"]) for c in cases.values()}
    tops = {dtype: top for dtype, top in tops.items() if top}
    if not tops:
        return None
    figure, axes = _figure(len(tops), (5, 3.6))
    for ax, (dtype, top) in zip(axes, tops.items()):
        ridge = top["flops"] / top["bytes"]
        span = [ridge / 4, ridge, max(ridge * 8, 1024)]
        ax.plot(span, [min(top["flops"], x * top["bytes"]) for x in span], color="black", linewidth=1)
        series: dict[str, list[tuple[float, float]]] = {}
        for case in cases.values():
            if case["dtype"] == dtype and BOTH in case["measures"]:
                for provider, e in case["measures"][BOTH]["providers"].items():
                    series.setdefault(provider, []).append((e["flops"] / e["bytes"], e["flops"]))
        for provider, points in series.items():
            marker = {"frozen": "s", "masm": "o"}.get(provider, "x")
            ax.plot(*zip(*points), marker, label=provider, markersize=5, fillstyle="none")
        ax.set(xscale="log", yscale="log", xlabel="FLOP a byte (least traffic)", ylabel="FLOP/s", title=dtype)
        ax.legend(fontsize=6)
    return figure


def plot_scale(results: Results) -> Figure | None:
    """Time against M, R, K and the number of layers with the fitted lines."""
    cases = {key: case for key, case in _of(results, "scale").items() if case["extra"].get("lines")}
    if not cases:
        return None
    figure, axes = _figure(len(cases), (4, 3))
    for ax, (key, case) in zip(axes, cases.items()):
        points = case["values"][case["name"]]
        for provider, line in case["extra"]["lines"].items():
            entries = [case["measures"][f"{case['name']} = {x}"]["providers"][provider] for x in points]
            [drawn] = ax.plot(points, [e["median"] * 1e3 for e in entries], "o", markersize=4, label=provider)
            fitted = [(line["intercept"] + line["slope"] * x) * 1e3 for x in points]
            ax.plot(points, fitted, color=drawn.get_color(), linewidth=0.8)
        ax.set_title(key, fontsize=8)
        ax.set(xlabel=case["name"], ylabel="ms", ylim=(0, None))
        ax.legend(fontsize=7)
    return figure


def _figure(count: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels of `size` inches, at most four a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure, grid = new_figure(rows, columns, (size[0] * columns, size[1] * rows))
    axes = grid.flatten().tolist()
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


if __name__ == "__main__":
    sys.exit(main())
