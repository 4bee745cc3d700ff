"""A plan in words and as a table, for the terminal."""

from __future__ import annotations

from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from densegeo.calibration.plan import QuantizationPlan
from densegeo.precision import PRECISIONS

WIDE = 100  # columns of a terminal from which on there is room for bars


def print_plan(plan: QuantizationPlan, console: Console) -> None:
    """Each layer's own error as a table with bars, worst first, and what the plan amounts to."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    rows = sorted(plan.sensitivity, key=lambda row: -row.error.first)
    kinds = [kind for kind in ("depth", "normals") if rows and getattr(rows[0].error, kind) is not None]
    bars = console.width >= WIDE
    for name in ("MACs an image", *(column for kind in kinds for column in ((kind, "") if bars else (kind,)))):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("to", no_wrap=True)
    worst = {kind: max(getattr(row.error, kind) for row in rows) or 1.0 for kind in kinds}
    number_format = {"depth": "{:.5f}", "normals": "{:.3f}°"}
    for row in rows:
        cells: list[str | Bar] = []
        for kind in kinds:
            value = getattr(row.error, kind)
            cells += [number_format[kind].format(value), *([Bar(worst[kind], 0, value, width=5)] if bars else [])]
        table.add_row(escape(row.layer), f"{row.work:,}", *cells, plan.becomes(row.layer))
    if plan.sensitivity:
        console.print(table)
    for name, why in plan.left.items():
        console.print(f"[yellow]{escape(name)} stays as it is: {why}[/]", soft_wrap=True)
    console.print(f"{plan.amount} become {plan.format} (ranges by {plan.method})")
    if plan.error is not None:
        own = f", of which {plan.base} alone {plan.base_error.words}" if plan.base_error is not None else ""
        console.print(f"all together at most: {plan.error.words}{own}", soft_wrap=True)
    if plan.convolutions and not PRECISIONS[plan.format].fast_convolutions:
        console.print(
            f"[yellow]No kernel of convolutions in {plan.format} is known to be faster than floating point's: none was "
            "timed. Build from a plan without --convolutions too: `densegeo bench A B` of both, where they will run, "
            "decides.[/]",
            soft_wrap=True,
        )
