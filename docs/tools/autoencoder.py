"""Where the autoencoder's time goes, and its forms: tables from the record of benchmarks/autoencoder_layers.py."""

from __future__ import annotations

from typing import Any

from tables import record, source, table

NAME = "autoencoder_layers_cpu_zen5"
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch"}


def _runs(what: str) -> dict[str, Any]:
    """Of one measurement, by backend, in the order of the titles."""
    runs = {run.get("backend", ""): run for run in record(NAME)["runs"] if run["what"] == what}
    return {backend: runs[backend] for backend in (*TITLES, "") if backend in runs}


def kinds() -> list[str]:
    """Shares of each kind of layer, and what convolutions reach."""
    lines = []
    for backend, run in _runs("layers").items():
        for stage, found in run["stages"].items():
            total = sum(found["kinds_ms"].values())
            shares = [f"{100 * milliseconds / total:.0f} %" for milliseconds in found["kinds_ms"].values()]
            rows = found["convolutions"]
            work = sum(row["gflop"] for row in rows)
            speeds = [1e3 * work / sum(row[key] for row in rows) for key in ("ms", "alone_ms")]
            lines.append(
                [TITLES[backend], stage, *shares, *(f"{speed:.0f}" for speed in speeds), f"{run['ceiling_gflops']:.0f}"]
            )
    names = next(iter(_runs("layers").values()))["stages"]["encoder"]["kinds_ms"]
    head = ["", "", *names, "convolutions' GFLOP/s", "alone", "ceiling"]
    return [*table(head, lines), "", source(NAME)]


def convolutions() -> list[str]:
    """Every kind of convolution: what it reaches in the networks and alone, and its share of both networks' time."""
    runs = _runs("layers")
    shapes: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for backend, run in runs.items():
        for stage in run["stages"].values():
            for row in stage["convolutions"]:
                shapes.setdefault(_shape(row), {}).setdefault(backend, []).append(row)
    lines = []
    for shape, by_backend in sorted(shapes.items(), key=lambda item: -_gflop(item[1])):
        longest = max(by_backend.values(), key=len)
        cells = []
        for backend, run in runs.items():
            rows = by_backend.get(backend, [])
            work, total = sum(row["gflop"] for row in rows), sum(_total(stage) for stage in run["stages"].values())
            inside, alone = (sum(row[key] for row in rows) for key in ("ms", "alone_ms"))
            speeds = (
                f"{1e3 * work / inside:.0f} ({1e3 * work / alone:.0f}), {100 * inside / total:.1f} %" if rows else ""
            )
            cells.append(speeds)
        lines.append([shape, len(longest), f"{_gflop(by_backend):.1f}", *cells])
    head = ["", "how many", "GFLOP", *(TITLES[backend] for backend in runs)]
    return [*table(head, lines), "", source(NAME)]


def _shape(row: dict[str, Any]) -> str:
    kernel = "x".join(map(str, row["kernel"]))
    name = f"{row['inputs'][1]} → {row['outputs'][1]}, {kernel}, from {row['inputs'][3]} to {row['outputs'][3]} wide"
    return name + (", transposed" if row["kernel"] == [4, 4] else "")


def _gflop(by_backend: dict[str, list[dict[str, Any]]]) -> float:
    return max(sum(row["gflop"] for row in rows) for rows in by_backend.values())


def _total(stage: dict[str, Any]) -> float:
    return float(sum(stage["kinds_ms"].values()))


def forms() -> list[str]:
    """How much faster each form of the decoder is than nearest and 3x3."""
    runs = _runs("forms")
    names = list(dict.fromkeys(name for run in runs.values() for name in run["rows"]))
    lines = []
    for name in names:
        cells = []
        for run in runs.values():
            speed = run["rows"][name]["speedup"] if name in run["rows"] else None
            spread = (
                "" if speed is None else f"{speed['median']:.2f} ({speed['round_min']:.2f} to {speed['round_max']:.2f})"
            )
            cells.append(spread)
        lines.append([name, *cells])
    pictures = _runs("pictures")
    batch = [pictures[backend]["rows"]["one batch"]["speedup"] if backend in pictures else None for backend in runs]
    cells = ["" if s is None else f"{s['median']:.2f} ({s['round_min']:.2f} to {s['round_max']:.2f})" for s in batch]
    lines.append(["two latents as one batch, against one after the other", *cells])
    return [*table(["", *(TITLES[backend] for backend in runs)], lines), "", source(NAME)]


def count() -> list[str]:
    """Operations, bytes and floor of each form on a GPU."""
    (run,) = _runs("count").values()
    lines = [
        [row["part"], row["form"], f"{row['tflop']:.2f}", f"{row['gb']:.2f}", f"{row['floor_ms']:.2f}"]
        for row in run["rows"]
    ]
    head = ["", "form", "TFLOP", "GB", f"floor on an {run['gpu']}, ms"]
    return [*table(head, lines), "", source(NAME)]
