"""The report's content in order, and its text as Markdown, CSV and LaTeX."""

import csv
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from utils.metrics import MEASURES, fixed
from utils.plots import accuracy_limits, draw_curves, render
from utils.report.runs import Run
from utils.report.table import Cell, Line, shared_settings

TITLE = "Continual Distillation Learning: results"
ABOUT = (
    "Student: final average accuracy (%) / forgetting (points; the original's: summed over all T tasks, divided by "
    "T). Mean ± sample standard deviation over n seeds of complete runs. Difference: ours minus the paper's, for runs "
    "with its 10 tasks and its split, whatever their other settings. KD_Token is followed by its --kd_prompt_param. "
    "The last column is the teacher's accuracy (%). Bold: the best mean of a row, among the cells with the most seeds."
)
_ABOUT_GAINS = (
    "Student's accuracy minus that of the same student without distillation and with the same seed, in points: mean ± "
    "standard error of the n paired differences."
)
_ABOUT_CURVES = "Mean over the complete runs of each KD method, with the final accuracy; without distillation: dotted."
_ABOUT_PAPER = (
    "The paper's numbers: average accuracy / forgetting of the student after 10 tasks, from the authors' project page "
    "irvlutd.github.io/CDL as of 2026-08-17 (Zhang, Guo and Xiang, Continual Distillation Learning for Rehearsal-Free "
    "Class-Incremental Learning via Decoupled Prompting, CoLLAs 2026, arXiv 2407.13911). Its column DeiT is KD_Token "
    "1 6 here and D-CDL is KD_Token 12 6. It gives no spread."
)
_NAMES = ("teacher → student", "learner")
_RUN = ("folder", "data", *_NAMES, "KD method", "seed", "tasks", "accuracy (%)", "forgetting", "teacher (%)", "time")
_CSV_NAMES = "dataset t_model s_model learner_name KD_method kd_prompt_param settings seeds n unfinished"
_CSV_MEASURES = (*((name, "student") for name in MEASURES), ("final_average_accuracy", "teacher"))
_CSV_OTHERS = "paper_accuracy paper_forgetting difference_accuracy difference_forgetting"
_CSV_GAINS = "gain_over_none_mean gain_over_none_se gain_over_none_n"
_FORMULA = ("=", "+", "-", "@", "\t")  # a spreadsheet reads text that starts so as a formula
_CAPTION = (
    "average accuracy (%) / forgetting (points) of the student, mean ± standard deviation over n seeds; paper: the "
    "authors' project page (arXiv 2407.13911) as of 2026-08-17."
)
_TEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
    | {">": r"\textgreater{}", "±": r"$\pm$", "−": "$-$", "–": "--", "→": r"$\to$"}
    | {char: rf"\{char}" for char in "{}$&#_%"}
)


class Text(NamedTuple):
    """A piece of a cell, not yet escaped; ``style`` is "best", "value", "aside", "small", "mark" or empty."""

    text: str
    style: str = ""


class Picture(NamedTuple):
    """A PNG, and the text for those who cannot see it."""

    alt: str
    png: bytes


class Section(NamedTuple):
    """A heading, and the paragraph, table and pictures below it, as far as there are any."""

    level: int
    title: str
    about: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Sequence[Text]]] = ()
    leading: int = 1  # cells at the start of a row that name it
    pictures: Sequence[Picture] = ()


def compose(
    tables: Mapping[str, Sequence[Line]], runs: Sequence[Run], unused: Sequence[tuple[str, str]]
) -> list[Section]:
    """The sections of the report on all runs and on the folders that are not used."""
    has_paper = any(cell.paper for lines in tables.values() for line in lines for cell in line.cells.values())
    sections = [Section(1, TITLE, f"{ABOUT} {_ABOUT_PAPER}" if has_paper else ABOUT)]
    for dataset, lines in tables.items():
        sections += [_results(dataset, lines), _gains(lines)]
        pictures = _draw([line for line in lines if line.runs])
        sections.append(Section(3, "Accuracy of the students after each task", _ABOUT_CURVES, pictures=pictures))
    sections.append(Section(2, "Runs", head=(*_RUN, "state"), rows=[_run(run) for run in runs]))
    rows = [[[Text(folder)], [Text(reason)]] for folder, reason in unused]
    sections.append(Section(2, "Folders not used", head=("folder", "reason"), rows=rows))
    return [section for section in sections if section.rows or not section.head]


def _results(dataset: str, lines: Sequence[Line]) -> Section:
    rows = []
    for line in lines:
        best = line.best()
        cells = [_cell(cell, "best" if column == best else "value") for column, cell in line.cells.items()]
        rows.append([*_names(line), *cells, [Text(spread(line.teacher()))]])
    return Section(2, dataset, shared_settings(lines), [*_NAMES, *lines[0].cells, "teacher"], rows, leading=2)


def _gains(lines: Sequence[Line]) -> Section:
    gains = [(line, line.gains()) for line in lines if line.gains()]
    columns = [column for column in lines[0].cells if any(column in of for _, of in gains)]
    rows = []
    for line, of in gains:
        texts = [f"{spread(of[column], '+')} (n = {of[column][2]})" if column in of else "" for column in columns]
        rows.append([*_names(line), *([Text(text)] for text in texts)])
    return Section(3, "Compared with no distillation", _ABOUT_GAINS, [*_NAMES, *columns], rows, leading=2)


def _draw(lines: Sequence[Line]) -> list[Picture]:
    """For each line the students of all its KD methods, on one accuracy axis for all pictures."""
    limits = accuracy_limits(run.models["student"]["average_accuracy"] for line in lines for run in line.runs)
    pictures = []
    for line in lines:
        runs = {column: cell.runs for column, cell in line.cells.items() if cell.runs}
        curves = {name: [run.models["student"]["average_accuracy"] for run in of] for name, of in runs.items()}
        tasks = max(run.num_tasks for run in line.runs)
        alt = f"{line.name}: students' accuracy on the tasks seen, after each task; {', '.join(curves)}"
        pictures.append(Picture(alt, render(draw_curves, line.name, curves, tasks, limits, endings=["png"])["png"]))
    return pictures


def _names(line: Line) -> list[list[Text]]:
    label = [Text(line.label, "small")] if line.label else []
    return [[Text(line.row.models)], [Text(line.row.learner), *label]]


def _cell(cell: Cell, style: str) -> list[Text]:
    texts = []
    if cell.complete:
        accuracy, forgetting = spread(cell.measure("final_average_accuracy")), spread(cell.measure("forgetting"))
        texts += [Text(accuracy, style), Text(f"/ {forgetting}", "aside"), Text(f"(n = {len(cell.complete)})", "small")]
    if cell.paper:
        texts.append(Text(f"paper {pair(cell.paper)}", "small"))
    if cell.difference():
        texts.append(Text(f"diff. {pair(cell.difference(), '+')}", "small"))
    texts += [Text(progress, "mark") for progress in dict.fromkeys(run.progress for run in cell.complete if run.cut)]
    return texts + [Text(f"seed {run.seed} unfinished: {run.progress}", "mark") for run in cell.unfinished]


def _run(run: Run) -> list[list[Text]]:
    names = [run.folder, run.row.dataset, run.row.models, run.row.learner, run.column, str(run.seed), run.progress]
    teacher = run.models["teacher"]["final_average_accuracy"] if "teacher" in run.models else None
    results = [*map(_number, (run.accuracy, run.models["student"]["forgetting"], teacher)), run.time]
    state = Text("unfinished", "mark") if not run.complete else Text("cut (max_task)" if run.cut else "complete")
    return [[text] for text in (*map(Text, [*names, *results]), state)]


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else fixed(value, sign).replace("-", "−")


def pair(values: tuple[float, float], sign: str = "") -> str:
    """``82.39 / 7.33``."""
    return " / ".join(_number(value, sign) for value in values)


def spread(measured: Sequence[float | None] | None, sign: str = "") -> str:
    """``82.39 ± 0.31``, without the deviation for one seed; empty for None."""
    mean, deviation, *_ = measured or (None, None)
    return _number(mean, sign) + ("" if deviation is None else f" ± {deviation:.2f}")


def markdown(sections: Sequence[Section]) -> str:
    """The text of report.md, beside which the pictures are named as by ``picture_files``."""
    lines, files = [], iter(picture_files(sections))
    for section in sections:
        lines += [f"{'#' * section.level} {_md(section.title)}", ""]
        lines += [_md(section.about), ""] if section.about else []
        head = [[_md(title) for title in section.head], ["---"] * len(section.head)] if section.head else []
        rows = [*head, *([_join(cell, _md, "**{}**", "<br>") for cell in row] for row in section.rows)]
        lines += [*("| " + " | ".join(row) + " |" for row in rows)]
        lines += [*(f"![{_md(picture.alt)}]({next(files)})" for picture in section.pictures), ""]
    return "\n".join(lines)


def picture_files(sections: Sequence[Section]) -> dict[str, bytes]:
    """curves-1.png and so on: the pictures of all sections in their order."""
    pictures = [picture.png for section in sections for picture in section.pictures]
    return {f"curves-{number}.png": png for number, png in enumerate(pictures, 1)}


def _md(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", " ".join(text.split()))


def _join(cell: Sequence[Text], escape: Callable[[str], str], bold: str, line_break: str) -> str:
    """The text of a cell, in which a piece "aside" stays on the line of the one before it."""
    joined = ""
    for text, style in cell:
        joined += (" " if style == "aside" else line_break) if joined else ""
        joined += bold.format(escape(text)) if style == "best" else escape(text)
    return joined


def latex(sections: Sequence[Section]) -> str:
    """The text of report.tex: one table over both columns per data set, which needs no package."""
    lines = [f"% {_tex(section.about)}" for section in sections if section.level == 1]
    for section in (section for section in sections if section.level == 2 and section.leading == 2):
        columns = "ll" + "c" * (len(section.head) - 2)
        lines += [r"\begin{table*}", r"\centering", r"\fontsize{6}{7}\selectfont", r"\setlength{\tabcolsep}{2pt}"]
        lines += [rf"\caption{{{_tex(f'{section.title}: {_CAPTION}')}}}", rf"\begin{{tabular}}{{{columns}}}", r"\hline"]
        for row in [[[Text(title)] for title in section.head], *section.rows]:
            cells = [_join(cell, _tex, r"\textbf{{{}}}", r"\\") for cell in row]
            for place in range(2):  # the names, which would make the table too wide
                cells[place] = cells[place].replace(r" $\to$", r"\\$\to$").replace(", ", r",\\")
            cells = [rf"\shortstack{{\strut {cell}}}" if r"\\" in cell else cell for cell in cells]
            lines.append(" & ".join(cells) + r" \\ \hline")
        lines += [r"\end{tabular}", r"\end{table*}", ""]
    return "\n".join(lines)


def _tex(text: str) -> str:
    """Deviations are small and below the line: with 6 pt letters six columns of two numbers each fit a page."""
    return re.sub(r" \$\\pm\$ ([0-9.]+)", r"$_{\\pm \1}$", text.translate(_TEX))


def csv_text(tables: Mapping[str, Sequence[Line]]) -> str:
    """The text of report.csv: one line per cell, empty where there is no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measures = [f"{role}_{name}_{part}" for name, role in _CSV_MEASURES for part in ("mean", "std")]
    writer.writerow([*_CSV_NAMES.split(), *measures, *_CSV_OTHERS.split(), *_CSV_GAINS.split()])
    for line in itertools.chain(*tables.values()):
        gains = line.gains()
        for column, cell in line.cells.items():
            if cell == Cell():
                continue
            method, _, param = column.partition(" ")
            seeds = " ".join(str(run.seed) for run in cell.complete)
            texts = [*line.row, method, param, line.label, seeds]
            texts = [f"'{text}" if text.startswith(_FORMULA) else text for text in texts]
            texts += [len(cell.complete), len(cell.unfinished)]
            pairs = [*(cell.measure(*of) for of in _CSV_MEASURES), cell.paper, cell.difference()]
            numbers = [number for values in pairs for number in values or (None, None)]
            numbers += gains.get(column, (None, None, None))
            writer.writerow(texts + ["" if number is None else f"{number:.6g}" for number in numbers])
    return out.getvalue()
