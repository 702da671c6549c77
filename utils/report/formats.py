"""The report as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from utils.metrics import MEASURES
from utils.report.runs import Column
from utils.report.table import (
    ABOUT,
    ABOUT_GAINS,
    NONE,
    PAPER_SHORT,
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

# -------------------------------------------------------------------------------------------------- Markdown


def _md(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", clean(text))


def _md_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [list(head), ["---"] * len(head), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _md_cell(cell: Cell, best: bool) -> str:
    parts = []
    accuracy, forgetting = ours_text(cell)
    if accuracy:
        parts.append(f"{f'**{accuracy}**' if best else accuracy} / {forgetting} (n = {len(cell.runs)})")
    if cell.paper:
        parts.append(f"paper {paper_text(cell)}")
    if cell.difference():
        parts.append(f"difference {difference_text(cell)}")
    return "<br>".join(parts + cell.marks())


def _md_dataset(report: Report, dataset: str) -> list[str]:
    columns = report.columns(dataset)
    table = []
    for row in report.rows(dataset):
        cells = report.cells[row]
        best = best_column(cells)
        learner = "<br>".join(map(_md, name_texts(row, report.labels[row])))
        texts = (_md_cell(cells.get(column, Cell()), column == best) for column in columns)
        table.append([_md(models_text(row)), learner, *texts, teacher_text(cells)])
    labels = [_md(column.label) for column in columns]
    head = ["teacher → student", "learner", *labels, "teacher"]
    lines = [f"## {_md(dataset)}", "", *_md_table(head, table)]
    columns, gains = report.gains(dataset)
    if gains:
        table = []
        for row, of in gains.items():
            learner = "<br>".join(map(_md, name_texts(row, report.labels[row])))
            table.append([_md(models_text(row)), learner, *(gain_text(of.get(column)) for column in columns)])
        head = ["teacher → student", "learner", *(_md(column.label) for column in columns)]
        lines += [_md(ABOUT_GAINS), "", *_md_table(head, table)]
    return lines


def markdown(report: Report) -> str:
    """The text of report.md."""
    lines = ["# Continual Distillation Learning: results", "", _md(ABOUT), ""]
    for dataset in report.datasets():
        lines += _md_dataset(report, dataset)
    lines += [*map(_md, report.sources()), "", "## Runs", ""]
    lines += _md_table(RUN_HEAD, [[_md(text) for text in run_texts(run)] for run in report.runs])
    if report.unused:
        lines += ["## Folders not used", ""]
        lines += [f"- {_md(folder)}: {_md(reason)}" for folder, reason in report.unused] + [""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- CSV

_CSV_MEASURES = (*((name, "student") for name in MEASURES), ("final_average_accuracy", "teacher"))
_CSV_HEAD = (
    "dataset", "t_model", "s_model", "learner_name", "KD_method", "kd_prompt_param", "settings", "seeds", "n",
    "unfinished", *(f"{role}_{name}_{part}" for name, role in _CSV_MEASURES for part in ("mean", "std")),
    "paper_accuracy", "paper_forgetting", "difference_accuracy", "difference_forgetting",
    "gain_over_none_mean", "gain_over_none_std", "gain_over_none_n",
)  # fmt: skip


def csv_text(report: Report) -> str:
    """The text of report.csv: one line per cell, empty where there is no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    for row, columns in report.cells.items():
        for column in sorted(columns, key=column_order):
            cell = columns[column]
            texts = [*row.key, column.method, " ".join(map(str, column.param)), report.labels[row],
                     " ".join(str(run.seed) for run in cell.runs)]
            numbers = _csv_numbers(cell, columns.get(NONE, Cell()) if column != NONE else Cell())
            writer.writerow([*map(clean, texts), len(cell.runs), len(cell.unfinished), *numbers])
    return out.getvalue()


def _csv_numbers(cell: Cell, none: Cell) -> list[str]:
    numbers: list[float | None] = []
    for name, role in _CSV_MEASURES:
        numbers += cell.measure(name, role) or (None, None)
    numbers += cell.paper or (None, None)
    numbers += cell.difference() or (None, None)
    numbers += cell.gain(none) or (None, None, None)
    return ["" if value is None else f"{value:.6g}" for value in numbers]


# ----------------------------------------------------------------------------------------------------- LaTeX

_TEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_",
        "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "±": r"$\pm$", "−": "$-$", "–": "--", "→": r"$\to$",
        "\ufffd": "?"}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in clean(text))


def _tex_spread(text: str) -> str:
    """The deviation small below the line: with 6 pt letters six columns of two numbers each fit a page."""
    mean, sign, std = text.partition(" ± ")
    return _tex(mean) + (rf"$_{{\pm {std}}}$" if sign else "")


def latex(report: Report) -> str:
    """The text of report.tex: one table over both columns per data set, which needs no package."""
    lines = [f"% {_tex(text)}" for text in (ABOUT, *report.sources())]
    for dataset in report.datasets():
        columns = report.columns(dataset)
        cells = [cell for row in report.rows(dataset) for cell in report.cells[row].values()]
        caption = rf"{_tex(dataset)}: average accuracy (\%) / forgetting (points) of the student"
        caption += r", mean$_{\pm\mathrm{std}}$ over seeds" if any(len(cell.runs) > 1 for cell in cells) else ""
        caption += f"; {_tex(PAPER_SHORT)}" if any(cell.paper for cell in cells) else ""
        caption += "; $^*$: unfinished runs do not count" if any(cell.unfinished for cell in cells) else ""
        head = ["Pair", "Learner", "", *(_tex(column.label) for column in columns)]
        lines += [r"\begin{table*}", r"\centering", r"\fontsize{6}{7}\selectfont", r"\setlength{\tabcolsep}{2pt}",
                  rf"\caption{{{caption}.}}", rf"\begin{{tabular}}{{lll{'c' * len(columns)}}}",
                  r"\hline", " & ".join(head) + r" \\"]
        pair = ""
        for row in report.rows(dataset):
            models = models_text(row)
            lines += [r"\hline"] if models != pair else []
            learner = ", ".join(name_texts(row, report.labels[row]))
            leading = ["" if models == pair else _tex(models), _tex(learner)]
            for what, texts in _tex_lines(report.cells[row], columns):
                lines.append(" & ".join([*leading, what, *texts]) + r" \\")
                leading = ["", ""]
            pair = models
        lines += [r"\hline", r"\end{tabular}", r"\end{table*}", ""]
    return "\n".join(lines)


def _tex_lines(cells: Mapping[Column, Cell], columns: Sequence[Column]) -> Iterator[tuple[str, list[str]]]:
    """Up to four lines of a row: ours, its number of seeds, the paper's and the difference, where there are any."""
    best = best_column(cells)
    ours, seeds, paper, difference = [], [], [], []
    for column in columns:
        cell = cells.get(column, Cell())
        accuracy, forgetting = map(_tex_spread, ours_text(cell))
        accuracy = rf"\textbf{{{accuracy}}}" if column == best else accuracy
        ours.append((f"{accuracy} / {forgetting}" if accuracy else "") + ("$^*$" if cell.unfinished else ""))
        seeds.append(str(len(cell.runs)) if cell.runs else "")
        paper.append(_tex(paper_text(cell)))
        difference.append(_tex(difference_text(cell)))
    for what, texts in (("ours", ours), ("seeds", seeds), ("paper", paper), ("difference", difference)):
        if any(texts):
            yield what, texts
