import csv
import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import threading

import pytest

from utils.metrics import AccuracyMatrix, build_metrics, metrics_json
from utils.report.__main__ import main
from utils.report.runs import Column, find_runs, read_run
from utils.report.table import Cell, build_report, paper_numbers

BASE_SMALL = {"t_model": "vit_base_patch16_224", "s_model": "vit_small_patch16_224"}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes most of a report's time, so only the tests of the page in a browser do it."""
    if "page" not in request.fixturenames:
        monkeypatch.setattr("utils.report.page.curves_png", lambda *arguments: b"picture")


def put(folder, *, final=60.0, tasks=2, done=None, dataset="Emoji_R", learner="L2P", method="KD", seed=1,
        t_model="mini_vit_base", s_model="mini_vit_small", seconds=None, phases=(), data=None, **settings):
    """A run that never took place: ``final`` is the student's accuracy on each task after the last one."""
    done = tasks if done is None else done
    rows = [[final + 1.0] * (task + 1) for task in range(done)]
    rows[-1] = [final] * done
    student = AccuracyMatrix(rows)
    metrics = build_metrics(
        settings={"dataset": dataset, "learner_name": learner, "KD_method": method, "t_model": t_model,
                  "s_model": s_model, "random_s": seed, "kd_prompt_param": [4, 6], "lr": 0.1, **settings},
        settings_hash="0", num_tasks=tasks, classes=[(i, i + 1) for i in range(tasks)],
        teacher=None if method == "none" else AccuracyMatrix([[80.0] * (i + 1) for i in range(done)]),
        student=student, parameters={}, losses={}, prompt_usage={}, data=data,
    )
    (folder / "Results").mkdir(parents=True)
    (folder / "Results" / "metrics.json").write_text(metrics_json(metrics), encoding="utf-8")
    if seconds is not None:
        (folder / "Results" / "timing.json").write_text(json.dumps(
            {"total_seconds": seconds, "phases": [{"phase": phase} for phase in phases]}))
    return folder


def report(*folders, out):
    """The four files, by their ending."""
    assert main([*map(str, folders), "--out", str(out)]) == 0
    return {path.suffix[1:]: path.read_text(encoding="utf-8") for path in out.iterdir()}


def cells(files, student=None):
    """The lines of report.csv by learner, method, its parameters and further settings, for one student."""
    rows = csv.DictReader(io.StringIO(files["csv"]))
    keys = ("learner_name", "KD_method", "kd_prompt_param", "settings")
    return {tuple(row[key] for key in keys): row for row in rows if student in (None, row["s_model"])}


def test_paper_numbers():
    paper = paper_numbers()
    assert len(paper) == 12 and all(len(row) in (6, 7) for row in paper.values())
    row = paper["ImageNet_R", "vit_large_patch16_224", "vit_base_patch16_224", "L2P"]
    assert row[Column("none")] == (71.59, 5.65) and row[Column("KD_Token", (1, 6))] == (71.89, 3.42)
    row = paper["CIFAR100", "vit_base_patch16_224", "vit_small_patch16_224", "CODAPrompt"]
    assert row[Column("ReviewKD")] == (82.20, 7.54)
    assert row[Column("KD_Token", (1, 6))] == (83.72, 6.40) and row[Column("KD_Token", (12, 6))] == (84.31, None)


def data_of(**changes):
    """As runs tell what they were trained on."""
    return {"split": "folder", "classes": 4, "class_names_sha256": "a" * 64, "train_images": 28, "test_images": 12,
            **changes}  # fmt: skip


def test_data_sets_of_one_name_are_told_apart(tmp_path):
    """Also when the seed is the same, and when older runs do not tell what they were trained on."""
    others = [data_of(), data_of(classes=6), data_of(train_images=30), data_of(class_names_sha256="b" * 64), None]
    for number, data in enumerate(others):
        put(tmp_path / f"runs/{number}", final=10.0 * number, data=data)
    put(tmp_path / "runs/more tasks", tasks=3, data=data_of())
    put(tmp_path / "runs/second seed", seed=2, data=data_of())
    files = report(tmp_path / "runs", out=tmp_path / "out")
    rows = cells(files)
    assert sorted(row["n"] for row in rows.values()) == ["1"] * 5 + ["2"]
    assert any("classes 6, " in key[3] for key in rows) and any("tasks 3" in key[3] for key in rows)
    assert "which is used" not in files["md"]


def test_another_split_than_the_papers_has_no_difference(tmp_path):
    base = {"t_model": "vit_base_patch16_224", "s_model": "vit_small_patch16_224", "tasks": 10}
    for split in ("authors", "seeded"):
        put(tmp_path / split, dataset="ImageNet_R", data=data_of(split=split), **base)
    rows = cells(report(tmp_path / "authors", tmp_path / "seeded", out=tmp_path / "out"), base["s_model"])
    found = {split: [row["difference_accuracy"] for key, row in rows.items()
                     if f"split {split}" in key[3] and row["n"] == "1"] for split in ("authors", "seeded")}
    assert len(found["authors"]) == 1 and found["authors"] != [""] and found["seeded"] == [""]


def test_time_without_the_teachers_is_marked(tmp_path):
    put(tmp_path / "runs/whole", seconds=90, phases=("teacher", "student"))
    put(tmp_path / "runs/half", seconds=60, phases=("student",), seed=2)
    text = report(tmp_path / "runs", out=tmp_path / "out")["md"]
    assert text.count("(student only)") == 1 and "0:01:00 (student only)" in text.replace("\\", "")


def test_seeds_are_joined_and_all_else_is_told_apart(tmp_path):
    runs = tmp_path / "runs"
    put(runs / "a", seed=1, final=60.0)
    put(runs / "b", seed=2, final=62.0, workers=7)  # does not decide results
    put(runs / "c", seed=1, final=50.0, lr=0.2)
    put(runs / "d", seed=1, final=70.0, method="KD_Token")
    put(runs / "e", seed=1, final=71.0, method="KD_Token", kd_prompt_param=[1, 6])
    found = cells(report(runs, out=tmp_path / "out"))
    joined = found["L2P", "KD", "", "lr 0.1"]
    assert (joined["n"], joined["seeds"]) == ("2", "1 2")
    assert float(joined["student_final_average_accuracy_mean"]) == 61.0
    assert float(joined["student_final_average_accuracy_std"]) == pytest.approx(2**0.5, rel=1e-5)
    assert float(joined["student_forgetting_mean"]) == 0.5
    assert found["L2P", "KD", "", "lr 0.2"]["n"] == "1"
    assert found["L2P", "KD_Token", "4 6", "lr 0.1"]["n"] == found["L2P", "KD_Token", "1 6", "lr 0.1"]["n"] == "1"


def test_paper_beside_ours(tmp_path):
    put(tmp_path / "runs" / "a", dataset="CIFAR100", learner="CODAPrompt", final=83.0, tasks=10, **BASE_SMALL)
    put(tmp_path / "runs" / "b", dataset="CIFAR100", learner="CODAPrompt", final=84.0, tasks=10, method="KD_Token",
        kd_prompt_param=[12, 6], t_model="vit_base_patch16_224.augreg_in21k_ft_in1k", s_model=BASE_SMALL["s_model"])
    files = report(tmp_path / "runs", out=tmp_path / "out")
    assert files["csv"].count("\n") == 1 + 6 * 6 + 1  # all rows of the data set, and KDP
    found = cells(files, BASE_SMALL["s_model"])
    ours = found["CODAPrompt", "KD", "", ""]
    assert (ours["paper_accuracy"], ours["paper_forgetting"]) == ("82.39", "7.33")
    assert float(ours["difference_accuracy"]) == pytest.approx(0.61)
    assert float(ours["difference_forgetting"]) == pytest.approx(0.9 - 7.33)
    kdp = found["CODAPrompt", "KD_Token", "12 6", ""]
    assert (kdp["paper_accuracy"], kdp["paper_forgetting"], kdp["difference_forgetting"]) == ("84.31", "", "")
    assert found["L2P", "DKD", "", ""]["n"] == "0"
    for text in (files["md"], files["html"]):
        assert "paper 82.39 / 7.33" in text and "+0.61 / −6.43" in text
        assert "project page of the authors" in text and "1 6 here" in text
    assert "82.39 / 7.33" in files["tex"] and "arXiv 2407.13911.}" in files["tex"] and "ImageNet" not in files["tex"]


@pytest.mark.parametrize("change", [{"tasks": 2}, {"validation": True}, {"class_order": "shuffled"}])
def test_no_difference_to_the_paper_for_another_setting(tmp_path, change):
    put(tmp_path / "a", **{"dataset": "CIFAR100", "tasks": 10, **BASE_SMALL, **change})
    row = cells(report(tmp_path / "a", out=tmp_path / "out"), BASE_SMALL["s_model"])["L2P", "KD", "", ""]
    assert row["paper_accuracy"] == "77.92" and row["difference_accuracy"] == ""


def test_gain_over_no_distillation_is_paired_by_seed(tmp_path):
    for seed, none, kd in ((1, 50.0, 52.0), (2, 60.0, 63.0)):
        put(tmp_path / "runs" / f"none-{seed}", method="none", seed=seed, final=none)
        put(tmp_path / "runs" / f"kd-{seed}", seed=seed, final=kd)
    put(tmp_path / "runs" / "kd-3", seed=3, final=99.0)  # has no partner
    files = report(tmp_path / "runs", out=tmp_path / "out")
    row = cells(files)["L2P", "KD", "", ""]
    assert (row["gain_over_none_mean"], row["gain_over_none_n"]) == ("2.5", "2")
    assert float(row["gain_over_none_std"]) == pytest.approx(0.5**0.5, rel=1e-5)
    assert "+2.50 ± 0.71 (n = 2)" in files["md"] and "+2.50 ± 0.71 (n = 2)" in files["html"]


def test_best_of_a_row_is_among_the_cells_with_the_most_seeds(tmp_path):
    for seed in (1, 2):
        put(tmp_path / "runs" / f"kd-{seed}", seed=seed, final=60.0)
        put(tmp_path / "runs" / f"dkd-{seed}", seed=seed, final=61.0, method="DKD")
    put(tmp_path / "runs" / "none", method="none", final=99.0)
    files = report(tmp_path / "runs", out=tmp_path / "out")
    assert re.findall(r"\*\*(.*?)\*\*", files["md"]) == re.findall(r"<b>(.*?)</b>", files["html"]) == ["61.00 ± 0.00"]
    assert files["tex"].count(r"\textbf{61.00$") == files["tex"].count(r"\textbf") == 1
    assert " &  & seeds & 1 & 2 & 2 &" in files["tex"]


def test_unfinished_runs_are_marked_and_do_not_count(tmp_path):
    put(tmp_path / "runs" / "a", seed=1, final=60.0, tasks=5)
    put(tmp_path / "runs" / "b", seed=2, final=90.0, tasks=5, done=3, seconds=3700)
    files = report(tmp_path / "runs", out=tmp_path / "out")
    row = cells(files)["L2P", "KD", "", ""]
    assert (row["n"], row["unfinished"], row["student_final_average_accuracy_mean"]) == ("1", "1", "60")
    for text in (files["md"], files["html"]):
        assert "seed 2 unfinished: 3 of 5 tasks" in text and "1:01:40" in text
    assert "60.00 / 0.80$^*$" in files["tex"] and "$^*$: unfinished runs do not count.}" in files["tex"]


def test_damaged_and_foreign_folders_are_listed(tmp_path):
    runs = tmp_path / "runs"
    put(runs / "good")
    whole = (runs / "good" / "Results" / "metrics.json").read_text()
    nested = json.loads(whole)
    nested["student"]["accuracy_matrix"] = [[1.0], [2.0]]
    broken = {
        "empty": "", "half": whole[:100], "binary": "\x00\x01", "list": "[]", "other": '{"format": 9}',
        "lacks": '{"format": 1}', "matrix": json.dumps(nested), "deep": "[" * 100_000,
        "types": json.dumps(json.loads(whole) | {"settings": 3}),
        "null": json.dumps(json.loads(whole) | {"student": None, "dataset": None}),
        "param": json.dumps(json.loads(whole) | {"KD_method": "KD_Token", "settings": {"kd_prompt_param": "ab"}}),
    }
    for key, value in {"seed": True, "num_tasks": 10**7}.items():
        broken[f"odd-{key[:3]}"] = json.dumps(json.loads(whole) | {key: value})
    broken["huge-seed"] = json.dumps(json.loads(whole) | {"seed": 10**400})
    broken["odd-data"] = json.dumps(json.loads(whole) | {"dataset": "ImageNet_R", "data": [1]})
    nested["student"]["accuracy_matrix"] = [[True], [50.0, 60.0]]
    broken["true-accuracy"] = json.dumps(nested)
    for name, text in broken.items():
        (runs / name / "Results").mkdir(parents=True)
        (runs / name / "Results" / "metrics.json").write_text(text)
    (runs / "latin" / "Results").mkdir(parents=True)
    (runs / "latin" / "Results" / "metrics.json").write_bytes(b'{"format": "\xe9"}')
    (runs / "started").mkdir()
    (runs / "started" / "args.yaml").write_text("lr: 1")
    (runs / "notes" / "deeper").mkdir(parents=True)
    files = report(runs, out=runs / "report")
    listed = files["md"].partition("## Folders not used")[2]
    for name in [*broken, "latin", "started", "notes"]:
        assert f"/{name}: " in listed, name
    assert "good" not in listed and "report" not in listed and "no task was finished" in listed
    assert len(cells(files)) == 1
    assert "Folders not used" in files["html"]


def test_folder_of_repeated_seeds_is_no_damaged_run(tmp_path):
    (tmp_path / "args.yaml").write_text("lr: 1")
    for seed in (1, 2):
        put(tmp_path / f"seed-{seed}", seed=seed)
    runs, unused = find_runs([tmp_path])
    assert [run.seed for run in runs] == [1, 2] and unused == []


def test_the_same_run_counts_once(tmp_path):
    put(tmp_path / "runs" / "a", tasks=3)
    put(tmp_path / "runs" / "b", tasks=3, done=1)  # same settings and seed, less far
    runs, unused = find_runs([tmp_path, tmp_path / "runs", tmp_path / "runs" / "a"])
    assert len(runs) == 1 and runs[0].complete
    assert [reason.partition(" of ")[0] for _, reason in unused] == ["has the settings and the seed"]


def test_measures_are_computed_anew(tmp_path):
    folder = put(tmp_path / "a")
    path = folder / "Results" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["student"]["final_average_accuracy"] = 99.0
    path.write_text(json.dumps(metrics))
    assert read_run(folder).student["final_average_accuracy"] == 60.0


def test_text_from_folders_is_escaped_everywhere(tmp_path):
    evil = "<script>alert('x')</script>|$\\frac{&%_#~^`*"
    put(tmp_path / "runs" / "a<b>|$x", learner=evil, method=evil + "2", dataset=evil, lr=evil + "\ud800\x07\n")
    put(tmp_path / "runs" / "b", learner=evil, method=evil + "2", dataset=evil, t_model=evil)
    put(tmp_path / "runs" / "c", learner=evil, method=evil + "2", dataset=evil, lr=2)
    files = report(tmp_path / "runs", out=tmp_path / "out")
    assert "<script" not in files["html"] and "<b>|" not in files["html"]
    assert not re.search(r"(?<!\\)<script", files["md"])
    table = [line for line in files["md"].splitlines() if line.startswith("| ") and "script" in line]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[1:3]}) == 1
    assert not re.search(r"(?<!\\)[&%#_](?=script|~|\^)", files["tex"])
    assert all("\x07" not in text and "\n\n\n\n" not in text for text in files.values())


def test_same_runs_same_bytes(tmp_path):
    put(tmp_path / "runs" / "a")
    put(tmp_path / "runs" / "b", method="none")
    assert report(tmp_path / "runs", out=tmp_path / "one") == report(tmp_path / "runs", out=tmp_path / "two")


def test_new_methods_and_learners_get_their_place(tmp_path):
    put(tmp_path / "a", learner="Mine", method="MyKD", dataset="CIFAR100", **BASE_SMALL)
    built = build_report(*find_runs([tmp_path]))
    assert built.columns("CIFAR100")[-1] == Column("MyKD")
    assert built.rows("CIFAR100")[-1].learner == "Mine"
    assert Cell().measure("forgetting") is None


@pytest.mark.parametrize("arguments, words", [
    ([], "required: DIR"), (["nowhere"], "nowhere is not a folder"), (["."], "there is no run in ."),
    (["a", "--out", "file"], "--out file is a file"), (["a", "--out"], "--out"), (["a", "--of", "x"], "--of"),
])
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    if "a" in arguments:
        put(tmp_path / "a")
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "report").exists()


# ------------------------------------------------------------------------------------------------- a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.width, r.height] };
  const all = name => [...document.querySelectorAll(name)];
  const found = {width: innerWidth, scroll: document.documentElement.scrollWidth,
    tables: all("table").map(box), images: all("img").map(e => [...box(e), e.naturalWidth]),
    cells: all("td").filter(e => e.textContent).map(box)};
  document.title = JSON.stringify(found);
})</script>"""


def browse(tmp_path, url, width, *flags):
    """Standard output and error of a headless Chromium that opens ``url``."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", f"--window-size={width},900",
        *flags, url,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path,
                            env={**os.environ, "HOME": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.fixture
def page(tmp_path):
    """The page of a report with everything in it."""
    pytest.importorskip("matplotlib")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: the page was not opened in a browser")
    runs = tmp_path / "runs"
    for seed in (1, 2):
        for method in ("none", "KD", "KD_Token"):
            put(runs / f"{method}-{seed}", seed=seed, final=80.0 + seed, method=method, dataset="CIFAR100", tasks=10,
                **BASE_SMALL)
    put(runs / "a rather long name of a folder & more" / ("x" * 60), done=1)
    (runs / "foreign").mkdir()
    report(runs, out=tmp_path / "out")
    return tmp_path / "out" / "report.html"


def test_page_asks_for_nothing_and_has_no_console_error(tmp_path, page):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    serve = functools.partial(Handler, directory=page.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _, log = browse(tmp_path, f"http://127.0.0.1:{server.server_port}/report.html", 1280, "--dump-dom")
        server.shutdown()
    assert asked == ["/report.html"]
    assert "CONSOLE" not in log
    targets = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>]*)""", page.read_text())
    assert len(targets) > 3 and all(target.startswith("data:") for target in targets)


@pytest.mark.parametrize("width", [1280, 400])
def test_tables_and_pictures_are_visible(tmp_path, page, width):
    # The policy of the page forbids the script that measures, so it is taken out of this copy, and a frame
    # gives the width: Chromium's own window may have a least width.
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    (page.parent / "copy.html").write_text(text.replace("</head>", MEASURE + "</head>"))
    (page.parent / "frame.html").write_text(
        f'<iframe id="f" src="copy.html" style="border:0;width:{width}px;height:900px"></iframe>'
        '<script>addEventListener("load", () => setTimeout(() => {'
        'document.title = document.getElementById("f").contentDocument.title }, 300))</script>')
    dom, log = browse(tmp_path, (page.parent / "frame.html").as_uri(), 1400, "--dump-dom",
                      "--allow-file-access-from-files", "--virtual-time-budget=5000")
    found = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    assert found["width"] == width and found["scroll"] <= width
    assert len(found["tables"]) == 4 and len(found["images"]) == 4
    for left, right, wide, high in found["tables"] + found["cells"]:
        assert left >= 0 and right <= width + 1 and wide > 20 and high > 10
    for left, right, wide, high, natural in found["images"]:
        assert left >= 0 and right <= width + 1 and wide >= 300 and high > 200 and natural > 500
