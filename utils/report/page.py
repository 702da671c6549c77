"""The report as one HTML page: style and pictures inline, no script, no request to anywhere."""

import base64
import html
from collections.abc import Sequence

from utils.report.formats import TITLE, Picture, Section, Text

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 1500px; padding: 0 16px 40px }
h2 { font-size: 1.3em; margin-top: 2em; border-bottom: 2px solid #0072b2 }
p { max-width: 80ch }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: 5px; text-align: left; vertical-align: top }
.wide { overflow-x: auto }
tbody th { overflow-wrap: anywhere; min-width: 8em }
thead th { border-bottom: 2px solid #888; vertical-align: bottom }
thead th:not(:first-child), .best, .value, td .small, .aside { white-space: nowrap }
.best { background: #cfe6f3; font-weight: bold }
.aside, .small, .mark { display: block; font-size: 12px; font-weight: normal; color: #555 }
.mark { color: #a33c00 }
.curves { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)) }
figure { margin: 0 }
img { max-width: 100%; height: auto; display: block }
@media (max-width: 900px) {
  thead { display: none }
  table, tbody, tr, th, td { display: block; width: auto }
  tr { border-top: 2px solid #888; padding: 4px 0 }
  tbody th { border: 0; font-size: 14px }
  td { display: flex; gap: 10px; overflow-wrap: anywhere }
  td:empty { display: none }
  td::before { content: attr(data-label); flex: 0 0 8.5em; color: #555 }
}
</style>
</head>
<body>
"""


def html_page(sections: Sequence[Section]) -> str:
    """The text of report.html."""
    lines = [_HEAD.replace("{title}", TITLE)]
    for section in sections:
        lines.append(f"<h{section.level}>{html.escape(section.title)}</h{section.level}>")
        if section.about:
            lines.append(f"<p>{html.escape(section.about)}</p>")
        if section.head:
            lines += _table(section)
        if section.pictures:
            lines += ['<div class="curves">', *map(_figure, section.pictures), "</div>"]
    return "\n".join([*lines, "</body>", "</html>", ""])


def _table(section: Section) -> list[str]:
    """A table that turns into a list of labelled values on narrow screens."""
    head = [html.escape(title) for title in section.head]
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    lines = ['<div class="wide">', "<table>", f"<thead><tr>{titles}</tr></thead>", "<tbody>"]
    for row in section.rows:
        cells = [_cell(texts) for texts in row]
        names = "".join(f'<th scope="row">{cell}</th>' for cell in cells[: section.leading])
        labelled = list(zip(head, cells, strict=True))[section.leading :]
        values = "".join(f'<td data-label="{title}">{cell}</td>' for title, cell in labelled)
        lines.append(f"<tr>{names}{values}</tr>")
    return [*lines, "</tbody>", "</table>", "</div>"]


def _cell(texts: Sequence[Text]) -> str:
    spans = "".join(f'<span class="{style}">{html.escape(text)}</span>' for text, style in texts if text)
    return f"<div>{spans}</div>" if spans else ""


def _figure(picture: Picture) -> str:
    png = base64.b64encode(picture.png).decode()
    return f'<figure><img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{png}"></figure>'
