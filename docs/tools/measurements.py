"""Tables of what benchmarks measured, from benchmarks/results/ alone."""

from __future__ import annotations

import re
from typing import Any

from tables import RESULTS, record, source, table

MB = 1_000_000


def _change(part: float, whole: float) -> str:
    """By how much `part` is above `whole`: "+42 %"."""
    share = 100 * (part / whole - 1)
    return "0 %" if abs(share) < 0.05 else f"{share:+.{0 if abs(share) >= 10 else 1}f} %"


def _power(number: float) -> str:
    """1.2e-3, without zeros before the exponent."""
    return re.sub(r"e([+-])0*", r"e\1", f"{number:.1e}")


def rewrites() -> list[str]:
    lines: list[list[str]] = []
    runs = {"FE2E": "rewrites_cpu_zen4", "FiffDepth": "rewrites_fiffdepth_cpu_zen4"}
    for model, name in runs.items():
        prices = record(name)["rewrites"]
        without = [(f"`{row['name']}`", row["stage"], row["alone_off"]) for row in prices["rows"]]
        without += [("all of them", stage, cost) for stage, cost in prices["none"].items()]
        for title, stage, off in without:
            on = prices["all"][stage]
            ratio = off["milliseconds"]["median_ms"] / on["milliseconds"]["median_ms"]
            costs = [_change(off[what], on[what]) for what in ("parameters", "flops")]
            lines.append([model, title, {"transformer": "denoiser"}.get(stage, stage), *costs, f"{ratio:.2f}"])
    head = ["model", "rewrite", "network", "parameters without it", "operations without it", "time without it / with"]
    return [*table(head, lines), "", source(*runs.values())]


def comparisons() -> list[str]:
    names = ("rewrites_cpu_zen4", "rewrites_cpu_zen4_whole")
    lines = []
    for name in names:
        for one in record(name)["comparisons"]:
            if name == names[0] and one["name"] == "whole pipeline":
                continue  # measured anew in the second
            speed = one["speedup"]
            spread = f"{speed['round_min']:.1f} to {speed['round_max']:.1f}"
            aim = one["target"] or ""
            lines.append([one["name"], one["slow"], one["fast"], f"{speed['median']:.1f}", spread, aim])
    head = ["what", "against", "ours", "times as fast, median", "rounds", "aim"]
    return [*table(head, lines), "", source(*names)]


def quantization() -> list[str]:
    names = (
        "quantization_cpu_zen4",
        "quantization_convolutions_cpu_zen5",
        "quantization_fp8_convolutions_cpu_zen5",
    )
    planned, *convolved = map(record, names)
    titles = {
        "fp32": "fp32",
        "bf16": "bf16",
        "fp8": "fp8 over fp32, planned",
        "fp8-bf16": "fp8 over bf16, planned",
        "fp8-attention": "fp8 over fp32, planned, with attention",
        "int8": "int8 over fp32, planned",
        "fp8-naive": "fp8, naive: all linears, over the whole range seen",
        "fp8-convolutions": "fp8 over fp32, with all convolutions that may",
        "int8-convolutions": "int8 over fp32, with all convolutions that may",
        "int8-convolutions-bf16": "int8 over bf16, with all convolutions that may",
        "int8-convolutions-budget": "int8 over fp32, with convolutions, `--max-normal-error 1 --twice`",
    }
    lines = []
    rows = [(planned, row) for row in planned["rows"]]
    known = {row["predictor"] for row in planned["rows"]}
    rows += [(other, row) for other in convolved for row in other["rows"] if row["predictor"] not in known]
    for run, row in rows:
        name = row["predictor"]
        change, share = run["changes"].get(name), run["shares"].get(name)
        pictured, doubled = (run.get(key, {}).get(name) for key in ("convolution_shares", "twice_shares"))
        if change is None:
            depth, normals = f"{row['depth']['abs_rel']:.4f}", f"{row['normals']['mean']:.2f}°"
        else:
            depth, normals = f"{100 * change['abs_rel']:+.2f} %", f"{change['normals']:+.3f}°"
        shares = ["" if amount is None else f"{100 * amount:.1f} %" for amount in (share, pictured)]
        if doubled:
            shares[1] += f" ({100 * doubled:.1f} % in two products)"
        lines.append([titles[name], *shares, depth, normals])
    bounds = ["bound of 8 bits", "", "", "2 %", "0.3°"]
    head = ["", "8-bit share of the linears", "of the convolutions' operations", "AbsRel", "error of the normals"]
    return [*table(head, [*lines, bounds]), "", source(*names)]


def fullsize() -> list[str]:
    runs = {
        "bf16": "fullsize_cpu_zen4",
        "fp8": "fullsize_fp8_cpu_zen4",
        "fp8 with attention": "fullsize_fp8_attention_cpu_zen4",
    }
    lines = []
    for title, name in runs.items():
        run = record(name)
        took = run.get("calibration")
        calibrated = "" if took is None else f"{took['seconds'] / 60:.0f} min, {took['anonymous_gib']:.1f} GiB"
        built = f"{run['seconds'] / 60:.0f} min, {run['peak_anonymous_gib']:.1f} GiB"
        check = next(check for check in run["checks"] if check["output"] in ("denoiser", "transformer"))
        error = f"{_power(check['error'])} ({_power(check['bound'])})"
        lines.append([title, calibrated, built, f"{run['bundle_bytes'] / 1e9:.1f} GB", error])
    head = ["", "calibration, 8 images", "build with its engines", "bundle", "error of the transformer (bound)"]
    return [*table(head, lines), "", source(*runs.values())]


def engines() -> list[str]:
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for one in record("engines_cpu_zen4")["engines"]:
        stage = "denoiser" if one["stage"] == "transformer" else one["stage"]
        model = f"`{one['model']}` {one['precision']}"
        kind = "input" if one["weights"] == "input" or one["model"] == "fe2e" else "constant"
        groups.setdefault((model, kind), {}).setdefault(stage, []).append(one)
    lines = []
    for (model, kind), stages in groups.items():
        cells = [stages[stage] for stage in ("encoder", "denoiser", "decoder")]
        note = ", the denoiser's weights as inputs" if kind == "input" else ""
        seconds = ", ".join(f"{max(one['seconds'] for one in cell):.1f}" for cell in cells)
        sizes = ", ".join(f"{max(one['engine_bytes'] for one in cell) / MB:.0f}" for cell in cells)
        work = ", ".join(f"{max(one['workspace_bytes'] for one in cell) / MB:.0f}" for cell in cells)
        lines.append([model + note, seconds, sizes, work])
    head = ["", "seconds: encoder, denoiser, decoder", "engines in MB", "workspace in MB"]
    return [*table(head, lines), "", source("engines_cpu_zen4")]


def h100() -> list[str]:
    name = "gpu_check_h100"
    steps = [run["steps"] for run in record(name)["runs"]]
    models = next(step["models"] for step in steps if "sizes" in step.get("models", {}))
    fiff = next(step["fiffdepth"] for step in steps if "fiffdepth" in step)
    large = {f"{size['size'][0]}x{size['size'][1]}": size["contenders"] for size in models["sizes"]}
    ways = [
        ("the authors' way, eager", "authors, eager", "plain, bf16, eager"),
        ("batch 1, everything in bf16, `torch.compile`", "batch 1, bf16, compiled", "plain, bf16, compiled"),
        ("densegeo in bf16", "folded, kernels, graph", "folded, kernels, graph"),
        ("densegeo in fp8 (linears)", "folded, kernels, graph, fp8", ""),
    ]
    lines = []
    for title, way, other in ways:
        cells = [f"{contenders[way]['ms']:.1f}" for contenders in large.values()]
        lines.append([title, *cells, f"{fiff['contenders'][other]['ms']:.1f}" if other else "not measured"])
    work = [f"{size['folded_tflop']:.0f}" for size in models["sizes"]]
    lines.append(["TFLOP of the rewritten networks, counted", *work, f"{fiff['folded_tflop']:.1f}"])
    head = ["milliseconds an image", *(f"FE2E {size}" for size in large), f"FiffDepth {fiff['side']}x{fiff['side']}"]
    alone, moved = fiff["ms an image of a batch"], next(s["transfers"] for s in steps if "transfers" in s)
    said = (
        f"With copies from and to the host, FE2E at 864x576 in bf16 takes {moved['one in flight']:.1f} ms an image. "
        f"FiffDepth in batches of eight takes {alone['8']:.1f} ms an image."
    )
    return [*table(head, lines), "", said, "", source(name)]


def fiffdepth_builds() -> list[str]:
    lines = []
    for run in record("fiffdepth_builds_cpu_zen4")["runs"]:
        for one in (build for build in run["builds"] if "checks" in build):  # the others are calibrations
            check = next(check for check in one["checks"] if check["output"] == "prediction")
            error = f"{_power(check['error'])} ({_power(check['bound'])})"
            own = [engine for engine in one["engines"] if engine["stage"] == "denoiser"]
            built = "; ".join(
                f"{engine['seconds']:.0f} s, {engine['bytes'] / MB:.0f} MB for {', '.join(engine['architectures'])}"
                for engine in own
            )
            weights = f"{one['weight_bytes'] / MB:.0f} MB"
            lines.append([one["precision"], f"{one['seconds']:.0f} s", weights, error, built])
    head = ["", "build", "weights", "error of the depth (bound)", "the U-Net's engines"]
    return [*table(head, lines), "", source("fiffdepth_builds_cpu_zen4")]


def fiffdepth_speed() -> list[str]:
    contenders = record("fiffdepth_speed_cpu_zen4")["rows"]
    ours = contenders["openvino bf16"]
    lines = []
    for title, row in contenders.items():
        slower = row["median_ms"] / ours["median_ms"]
        stages = row["stages_ms"]
        shown = [stages[name] / stages["total"] for name in ("encoder", "denoiser", "decoder") if stages]
        parts = ", ".join(f"{100 * share:.0f} %" for share in shown)
        error = "" if row["error"] is None else _power(row["error"])
        lines.append([title, f"{slower:.1f}", error, parts])
    head = ["", "time / ours in bf16", "error", "encoder, U-Net, decoder"]
    return [*table(head, lines), "", source("fiffdepth_speed_cpu_zen4")]


def accuracy() -> list[str]:
    lines = []
    for row in record("accuracy_fe2e_tiny")["rows"]:
        depth, normals = row["depth"], row["normals"]
        title = row["predictor"] if row["model"] is None else f"`{row['model']}` {row['precision']}"
        cells = [f"{depth['abs_rel']:.4f}", f"{depth['delta1']:.3f}", f"{normals['mean']:.2f}°"]
        lines.append([title, *cells, f"{normals['below_11_25']:.0f} %"])
    aims = ["aim", "0.10", "0.90", "20°", ""]
    head = ["", "AbsRel", "δ1", "normals, mean", "below 11.25°"]
    return [*table(head, [*lines, aims]), "", source("accuracy_fe2e_tiny")]


def _environments(found: Any) -> list[dict[str, Any]]:
    """Where a file's runs were made: one with several has a list of them."""
    rows = found.get("runs")
    if isinstance(rows, list) and all("command" in row or "line" in row for row in rows):  # elsewhere what was timed
        return rows
    return [{**found, **found.get("environment", {})}]


def _versions(run: dict[str, Any]) -> str:
    shown = ("torch", "triton", "onnxruntime", "openvino", "tensorrt-rtx-cu13", "tensorrt_rtx_cu13", "diffusers")
    names = {"tensorrt_rtx_cu13": "tensorrt-rtx-cu13"}
    have = run.get("versions", {})
    return ", ".join(f"{names.get(name, name)} {have[name]}" for name in shown if name in have)


def runs() -> list[str]:
    lines: dict[str, list[list[str]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        for found in _environments(record(path.stem)):
            machine = found.get("machine", {})
            if isinstance(machine, str):
                machine = {"cpu": machine}
            gpus = machine.get("gpus") or [found.get("device", "")]
            gpu = re.sub(r",.*", "", gpus[0]) if gpus[0] else ""
            cores = f", {machine['cpu_count']} cores" if "cpu_count" in machine else ""
            where = gpu or f"{machine.get('cpu', 'a CPU')}{cores}"
            link = f"[{path.stem}](../benchmarks/results/{path.name})"
            command = re.sub(r" --json \S+", "", found.get("command") or found.get("line") or "")
            commit = str(found.get("commit", ""))[:7]
            cells = [link, f"`{command}`" if command else "", commit, _versions(found)]
            lines.setdefault(where, []).append(cells)
    said: list[str] = []
    for where, rows in sorted(lines.items()):
        said += [f"**{where}**", "", *table(["record", "command", "commit", "versions"], rows), ""]
    return said
