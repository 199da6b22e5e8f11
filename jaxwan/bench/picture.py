"""The growth of cost as a picture: one panel an axis, both scales logarithmic."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxwan.bench.report import Row

PICTURE_NAME = "growth.png"
PANEL = 520, 400
MARGIN = 86, 44, 24, 60  # left, top, right, bottom of a panel
COLUMNS = 2
INK, GRID, LINE, GUIDE = "#222222", "#dddddd", "#1f5fbf", "#aaaaaa"
Points = list[tuple[float, float]]


def draw_growth(rows: Sequence[Row], folder: Path) -> Path | None:
    """Write the picture of all measured growth rows beside the report; None where there are none."""
    from PIL import Image, ImageDraw

    series = growth_series(rows)
    if not series:
        return None
    lines = -(-len(series) // COLUMNS)
    image = Image.new("RGB", (PANEL[0] * min(len(series), COLUMNS), PANEL[1] * lines), "white")
    draw = ImageDraw.Draw(image)
    for i, (name, points) in enumerate(series.items()):
        _panel(draw, (PANEL[0] * (i % COLUMNS), PANEL[1] * (i // COLUMNS)), name, points)
    image.save(folder / PICTURE_NAME)
    return folder / PICTURE_NAME


def growth_series(rows: Sequence[Row]) -> dict[str, Points]:
    """ "preset: axis" -> (value, median seconds) of every growth row that was measured."""
    series: dict[str, Points] = {}
    for row in rows:
        kind, *rest = row.name.split("/")
        if kind == "growth" and row.median and "axis" in row.details:
            points = series.setdefault(f"{rest[0]}: {row.details['axis']}", [])
            points.append((float(row.details["value"]), row.median))
    return {name: sorted(points) for name, points in series.items()}


def _panel(draw: Any, corner: tuple[int, int], name: str, points: Points) -> None:
    """One axis: its points, and a dashed line of proportional growth from the first of them."""
    from PIL import ImageFont

    large, small = ImageFont.load_default(18), ImageFont.load_default(13)
    left, top = corner[0] + MARGIN[0], corner[1] + MARGIN[1]
    right, bottom = corner[0] + PANEL[0] - MARGIN[2], corner[1] + PANEL[1] - MARGIN[3]
    (first, cost), last = points[0], points[-1][0]
    guide = [(first, cost), (last, cost * last / first)]
    x_low, x_high = _range([x for x, _ in points])
    y_low, y_high = _range([y for _, y in points + guide])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - math.log(x_low)) / (math.log(x_high) - math.log(x_low))
        up = (math.log(y) - math.log(y_low)) / (math.log(y_high) - math.log(y_low))
        return left + across * (right - left), bottom - up * (bottom - top)

    draw.text((left, corner[1] + 12), name, fill=INK, font=large)
    for value in ticks(y_low, y_high):
        y = place(x_low, value)[1]
        draw.line([(left, y), (right, y)], fill=GRID)
        draw.text((left - 8, y), f"{value:g} s", fill=INK, font=small, anchor="rm")
    for value, _ in points:
        x = place(value, y_low)[0]
        draw.line([(x, top), (x, bottom)], fill=GRID)
        draw.text((x, bottom + 8), f"{value:g}", fill=INK, font=small, anchor="mt")
    draw.text(((left + right) / 2, bottom + 30), f"{name.split(': ')[-1]} (dashed: in proportion)", fill=INK,
              font=small, anchor="mt")  # fmt: skip
    _dashed(draw, place(*guide[0]), place(*guide[1]))
    draw.line([place(*point) for point in points], fill=LINE, width=3, joint="curve")
    for point in points:
        x, y = place(*point)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=LINE)
        draw.text((x - 7, y - 5), f"{point[1]:.3g}", fill=LINE, font=small, anchor="rb")
    draw.rectangle([left, top, right, bottom], outline=INK)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A span around the values that is wide enough to have a logarithm's scale."""
    low, high = min(values), max(values)
    room = max(high / low, 2.0) ** 0.12
    return low / room, high * room


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the ends; at least one."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return found or [math.sqrt(low * high)]


def _dashed(draw: Any, start: tuple[float, float], end: tuple[float, float], pieces: int = 30) -> None:
    for i in range(0, pieces, 2):
        a, b = ([s + (e - s) * t / pieces for s, e in zip(start, end, strict=True)] for t in (i, i + 1))
        draw.line([*a, *b], fill=GUIDE, width=2)
