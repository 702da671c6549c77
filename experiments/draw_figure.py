"""Draw D-CDL, the figure of the README: ``python -m experiments.draw_figure`` writes experiments/results/d_cdl.svg.

Plain SVG text, 600 wide with letters of 16, so that it can be read at 400 pixels as at 900, on a white page of its own.
"""

from collections.abc import Sequence
from pathlib import Path

OUT = Path(__file__).parent / "results" / "d_cdl.svg"
BLUE, ORANGE, GREY = ("#1f5fa8", "#dbe9f8"), ("#c05a00", "#ffe6cc"), ("#444444", "#eeeeee")  # line and fill
Colour = tuple[str, str]


def box(x: float, y: float, width: float, height: float, lines: Sequence[str], colour: Colour = GREY) -> str:
    """A rounded box with centred lines of text, the first one bold."""
    dark, light = colour
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{light}" stroke="{dark}"/>'
    top = y + height / 2 - 10 * (len(lines) - 1) + 6
    return shape + "".join(text(x + width / 2, top + 20 * i, line, dark, bold=i == 0) for i, line in enumerate(lines))


def text(x: float, y: float, words: str, colour: str = GREY[0], bold: bool = False, anchor: str = "middle") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}"{weight}>{words}</text>'


def arrow(points: str, colour: Colour = GREY, width: float = 1.8) -> str:
    """A line through ``x,y x,y ...`` that ends in an arrowhead."""
    name = {BLUE: "blue", ORANGE: "orange", GREY: "grey"}[colour]
    style = f'fill="none" stroke="{colour[0]}" stroke-width="{width}" marker-end="url(#{name})"'
    return f'<polyline points="{points}" {style}/>'


def head(name: str, colour: Colour) -> str:
    size = 'viewBox="0 0 10 10" refX="9" refY="5" markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9"'
    return f'<marker id="{name}" {size} orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour[0]}"/></marker>'


def draw() -> str:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 372" font-family="Helvetica, Arial, sans-serif"'
        ' font-size="16" role="img" aria-label="D-CDL: teacher, student, learner prompts and KD prompts">',
        f"<defs>{head('blue', BLUE)}{head('orange', ORANGE)}{head('grey', GREY)}</defs>",
        '<rect width="600" height="372" fill="#ffffff"/>',
        # teacher
        box(150, 10, 200, 32, ["learner prompts"], BLUE),
        *(arrow(f"{x},42 {x},64", BLUE) for x in (180, 220, 260)),
        box(120, 66, 260, 54, ["teacher", "large ViT, frozen"]),
        arrow("380,93 428,93"),
        box(430, 66, 160, 54, ["class head", "learns the labels"], BLUE),
        # image, and the teacher's answer
        box(8, 142, 76, 54, ["image"]),
        arrow("46,142 46,93 118,93"),
        arrow("46,196 46,232 118,232"),
        arrow("510,120 510,156", ORANGE, 3),
        text(498, 144, "distillation", ORANGE[0], bold=True, anchor="end"),
        # student
        box(150, 142, 200, 32, ["learner prompts"], BLUE),
        *(arrow(f"{x},174 {x},196", BLUE) for x in (180, 220, 260)),
        box(120, 198, 260, 68, ["student", "small ViT, frozen"]),
        box(130, 288, 240, 32, ["KD prompts, KD token"], ORANGE),
        *(arrow(f"{x},288 {x},268", ORANGE) for x in (180, 220, 260, 300)),
        arrow("380,216 404,216 404,185 428,185", ORANGE),
        box(430, 158, 160, 54, ["KD head", "learns the teacher"], ORANGE),
        arrow("380,250 428,250"),
        box(430, 226, 160, 54, ["class head", "learns the labels"], BLUE),
        text(510, 304, "predicts: both heads"),
        # legend
        text(8, 344, "blue: learned task by task, as the learner prescribes", BLUE[0], anchor="start"),
        text(8, 364, "orange: for distillation alone, one set that lives through all tasks", ORANGE[0], anchor="start"),
        "</svg>\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
