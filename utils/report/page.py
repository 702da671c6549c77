"""The report as one HTML page: style and pictures inline, no script, no request to anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from utils.plots import accuracy_limits, curves_png
from utils.report.runs import Row
from utils.report.table import (
    ABOUT,
    ABOUT_GAINS,
    RUN_HEAD,
    Cell,
    Report,
    best_column,
    clean,
    column_order,
    difference_text,
    gain_text,
    models_text,
    name_texts,
    ours_text,
    paper_text,
    run_texts,
    teacher_text,
)

_TITLE = "Continual Distillation Learning: results"
_CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 1500px;
  padding: 0 16px 40px }
h1 { font-size: 1.6em }
h2 { font-size: 1.3em; margin-top: 2em; border-bottom: 2px solid #0072b2 }
h3 { font-size: 1.05em; margin: 1.8em 0 .4em }
p { max-width: 80ch }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: 8px 0; color: #444 }
caption span { display: block; max-width: 100ch }
th, td { border-bottom: 1px solid #ddd; padding: 5px; text-align: left; vertical-align: top }
.wide { overflow-x: auto }
.long { overflow-wrap: anywhere; min-width: 7em }
.long + .long { min-width: 8em }
thead th { border-bottom: 2px solid #888; vertical-align: bottom }
b { background: #cfe6f3 }
b, i { white-space: nowrap; font-style: normal }
.s { color: #555; font-size: 12px; font-weight: normal }
td .s { white-space: nowrap }
.mark { color: #a33c00; font-size: 12px }
.curves { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)) }
figure { margin: 0 }
img { max-width: 100%; height: auto; display: block }
code { overflow-wrap: anywhere }
@media (max-width: 900px) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  table, tbody, tr, th, td, caption { display: block; width: auto }
  tr { border-top: 2px solid #888; padding: 4px 0 }
  tbody th { border: 0; font-size: 14px }
  th, td { overflow-wrap: anywhere }
  td { display: flex; gap: 10px }
  td:empty { display: none }
  td::before { content: attr(data-label); flex: 0 0 8.5em; color: #555 }
}
"""
_HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{_TITLE}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{_TITLE}</h1>"""


def _h(text: str) -> str:
    return html.escape(clean(text))


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], leading: int) -> list[str]:
    """A table that turns into a list of labelled values on narrow screens.

    Args:
        caption: plain text.
        head: plain text of each column.
        rows: HTML of the cells of each row.
        leading: number of cells per row that name the row.
    """
    lines = ['<div class="wide">', "<table>"]
    if caption:
        lines.append(f"<caption><span>{_h(caption)}</span></caption>")
    titles = "".join(f'<th scope="col">{_h(text)}</th>' for text in head)
    lines.append(f"<thead><tr>{titles}</tr></thead>\n<tbody>")
    for cells in rows:
        named = "".join(f'<th scope="row" class="long">{text}</th>' for text in cells[:leading])
        values = "".join(f'<td data-label="{_h(label)}">{text}</td>'
                         for label, text in zip(head[leading:], cells[leading:], strict=True))
        lines.append(f"<tr>{named}{values}</tr>")
    return [*lines, "</tbody>", "</table>", "</div>"]


def _cell(cell: Cell, best: bool) -> str:
    parts = []
    accuracy, forgetting = ours_text(cell)
    if accuracy:
        tag = "b" if best else "i"
        parts += [f"<{tag}>{accuracy}</{tag}>", f'<span class="s">/ {forgetting}</span>']
        parts.append(f'<span class="s">n = {len(cell.runs)}</span>')
    if cell.paper:
        parts.append(f'<span class="s">paper {paper_text(cell)}</span>')
    if cell.difference():
        parts.append(f'<span class="s">diff. {difference_text(cell)}</span>')
    parts += [f'<span class="mark">{_h(mark)}</span>' for mark in cell.marks()]
    return f"<div>{'<br>'.join(parts)}</div>" if parts else ""


def _names(report: Report, row: Row) -> list[str]:
    """The two cells that name a row."""
    learner, *label = map(_h, name_texts(row, report.labels[row]))
    return [_h(models_text(row)), learner + "".join(f'<div class="s">{text}</div>' for text in label)]


def _dataset(report: Report, dataset: str) -> list[str]:
    columns = report.columns(dataset)
    rows = []
    for row in report.rows(dataset):
        cells = report.cells[row]
        best = best_column(cells)
        texts = (_cell(cells.get(column, Cell()), column == best) for column in columns)
        rows.append([*_names(report, row), *texts, teacher_text(cells)])
    labels = [column.label.replace(" ", "\N{NO-BREAK SPACE}") for column in columns]
    head = ["teacher → student", "learner", *labels, "teacher"]
    lines = [f"<h2>{_h(dataset)}</h2>", *_table(ABOUT, head, rows, leading=2)]
    columns, gains = report.gains(dataset)
    if gains:
        rows = [[*_names(report, row), *(gain_text(of.get(column)) for column in columns)]
                for row, of in gains.items()]
        head = ["teacher → student", "learner", *(column.label for column in columns)]
        lines.append("<h3>Compared with no distillation</h3>")
        lines += _table(ABOUT_GAINS, head, rows, leading=2)
    for row in report.rows(dataset):
        lines += _curves(report, row)
    return lines


def _curves(report: Report, row: Row) -> list[str]:
    """One picture per cell with all its runs, on the same accuracy axis for the whole row."""
    curves = {}
    for column in sorted(report.cells[row], key=column_order):
        runs = report.cells[row][column].runs + report.cells[row][column].unfinished
        if runs:
            teachers = [run.teacher["average_accuracy"] for run in runs if run.teacher is not None]
            students = [run.student["average_accuracy"] for run in runs]
            curves[column] = {"teacher": teachers, "student": students}
    if not curves:
        return []
    tasks = max(run.num_tasks for cell in report.cells[row].values() for run in cell.runs + cell.unfinished)
    limits = accuracy_limits(curve for roles in curves.values() for of in roles.values() for curve in of)
    title = ", ".join([models_text(row), *name_texts(row, report.labels[row])])
    lines = [f"<h3>{_h(title)}: accuracy after each task</h3>", '<div class="curves">']
    for column, roles in curves.items():
        picture = base64.b64encode(curves_png(clean(column.label), roles, limits, tasks)).decode()
        alt = (f"{column.label}: mean accuracy on the tasks seen, after each task; "
               f"each of {len(roles['student'])} runs thin, the mean of the complete ones thick")
        lines.append(f'<figure><img alt="{_h(alt)}" src="data:image/png;base64,{picture}"></figure>')
    return [*lines, "</div>"]


def html_page(report: Report) -> str:
    """The text of report.html."""
    lines = [_HEAD]
    for dataset in report.datasets():
        lines += _dataset(report, dataset)
    lines += [*(f"<p>{_h(source)}</p>" for source in report.sources()), "<h2>Runs</h2>"]
    rows = []
    for run in report.runs:
        texts = dict(zip(RUN_HEAD, map(_h, run_texts(run)), strict=True))
        texts["tasks"] = f"<i>{texts['tasks']}</i>"
        if not run.complete:
            texts["state"] = f'<span class="mark">{texts["state"]}</span>'
        rows.append(list(texts.values()))
    lines += _table("", RUN_HEAD, rows, leading=1)
    if report.unused:
        items = (f"<li><code>{_h(folder)}</code>: {_h(reason)}</li>" for folder, reason in report.unused)
        lines += ["<h2>Folders not used</h2>", "<ul>", *items, "</ul>"]
    return "\n".join([*lines, "</body>", "</html>", ""])
