"""A plan's sensitivities as a picture: a row a layer, bars for what quantizing it alone does to depth and normals."""

from __future__ import annotations

from xml.sax.saxutils import escape

from densegeo.calibration.plan import QuantizationPlan, Sensitivity

ROW, NAMES, BAR, GAP = 16, 380, 260, 90  # pixels: height of a row, widths of the names and of a full bar
PLANNED, EXCLUDED = "#2a6fbb", "#c9c9c9"


def draw(plan: QuantizationPlan) -> str:
    """SVG, the most sensitive layer first; grey bars are those that stay in floating point."""
    rows = sorted(plan.sensitivity, key=lambda row: -row.error.first)
    columns = [
        (name, [value for value in values if value is not None], number_format)
        for name, values, number_format in (
            ("depth (root mean square)", [row.error.depth for row in rows], "{:.5f}"),
            ("normals (mean)", [row.error.normals for row in rows], "{:.3f}°"),
        )
        if None not in values
    ]
    width, height = NAMES + len(columns) * (BAR + GAP), ROW * (len(rows) + 3)
    title = f"{plan.format}: error of each layer quantized alone; planned: {plan.amount}"
    parts = [_text(8, ROW, title, "bold")]
    parts += [_text(NAMES - 8, ROW * (index + 3), row.layer, anchor="end") for index, row in enumerate(rows)]
    for number, (name, values, number_format) in enumerate(columns):
        x, worst = NAMES + number * (BAR + GAP), max(values, default=0.0) or 1.0
        parts.append(_text(x, 2 * ROW, name, "bold"))
        for index, (row, value) in enumerate(zip(rows, values, strict=True)):
            parts += _bar(x, ROW * (index + 3), BAR * value / worst, number_format.format(value), _colour(plan, row))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _colour(plan: QuantizationPlan, row: Sensitivity) -> str:
    return PLANNED if plan.takes(row.layer) else EXCLUDED


def _bar(x: float, y: float, length: float, label: str, colour: str) -> list[str]:
    bar = f'<rect x="{x}" y="{y - ROW + 5}" width="{length:.1f}" height="{ROW - 4}" fill="{colour}"/>'
    return [bar, _text(x + length + 4, y, label)]


def _text(x: float, y: float, text: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}" text-anchor="{anchor}">{escape(text)}</text>'
