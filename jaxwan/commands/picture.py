"""Pictures of rectangles and texts, as SVG or PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

INK = "#24292f"
SCALE = 2  # pixels of a PNG for each unit


@dataclass(frozen=True)
class Box:
    """A rectangle. Units are those of an SVG; y goes down."""

    x: int | float
    y: int | float
    width: int | float
    height: int | float
    fill: str


@dataclass(frozen=True)
class Text:
    """A line of text. y is its middle; anchor: which end of it is at x, "start", "middle" or "end"."""

    x: int | float
    y: int | float
    text: str
    size: int | float = 13
    anchor: str = "start"
    fill: str = INK
    bold: bool = False


@dataclass(frozen=True)
class Picture:
    """What is drawn on white, in this order."""

    width: int | float
    height: int | float
    shapes: Sequence[Box | Text]

    def svg(self) -> str:
        """As a document."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" font-family="Helvetica, Arial, sans-serif">',
            f'<rect width="{self.width:g}" height="{self.height:g}" fill="#ffffff"/>',
        ]
        return "\n".join([*lines, *map(_svg, self.shapes), "</svg>"]) + "\n"

    def png(self, path: Path) -> None:
        """Write it in pixels."""
        from PIL import Image, ImageDraw, ImageFont

        image = Image.new("RGB", (round(self.width * SCALE), round(self.height * SCALE)), "white")
        draw = ImageDraw.Draw(image)
        for shape in self.shapes:
            if isinstance(shape, Box):
                corner = shape.x * SCALE, shape.y * SCALE
                end = corner[0] + shape.width * SCALE - 1, corner[1] + shape.height * SCALE - 1
                draw.rectangle([*corner, *end], fill=shape.fill)
            else:
                anchor = {"start": "lm", "middle": "mm", "end": "rm"}[shape.anchor]
                font = ImageFont.load_default(shape.size * SCALE)
                draw.text((shape.x * SCALE, shape.y * SCALE), shape.text, shape.fill, font, anchor)
        image.save(path, "PNG")


def _svg(shape: Box | Text) -> str:
    if isinstance(shape, Box):
        place = f'x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" height="{shape.height:g}"'
        return f'<rect {place} fill="{shape.fill}"/>'
    place = f'x="{shape.x:g}" y="{shape.y + 0.35 * shape.size:g}" font-size="{shape.size:g}"'  # y there: the baseline
    look = f'text-anchor="{shape.anchor}" fill="{shape.fill}"' + ' font-weight="bold"' * shape.bold
    return f"<text {place} {look}>{escape(shape.text)}</text>"
