import csv
import gzip
import io
import json
import os
import re
import shutil
import subprocess

import pytest

from tests.utils.fakes import DATA, fake_metrics
from utils.metrics import metrics_json
from utils.report.__main__ import main
from utils.report.runs import find_runs, read_run

PAPERS = {"dataset": "CIFAR100", "tasks": 10, "t_model": "vit_base_patch16_224", "s_model": "vit_small_patch16_224"}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes most of a report's time, so only the page in a browser has pictures."""
    if "browser" not in request.node.name:
        monkeypatch.setattr("utils.report.formats.render", lambda *arguments, endings: {"png": b"picture"})


def put(folder, *, final=60.0, tasks=2, done=None, method="KD", seed=1, **changes):
    """Write a run that never took place: ``final`` is the student's accuracy on each task after the last one."""
    done = done or tasks
    student = [*([final + 1.0] * (task + 1) for task in range(done - 1)), [final] * done]
    teacher = None if method == "none" else [[80.0] * (task + 1) for task in range(done)]
    metrics = fake_metrics(student, teacher, num_tasks=tasks, KD_method=method, random_s=seed, **changes)
    (folder / "Results").mkdir(parents=True)
    (folder / "Results" / "metrics.json").write_text(metrics_json(metrics), encoding="utf-8")
    return folder


def report(*folders, out):
    """The four files by their ending."""
    assert main([*map(str, folders), "--out", str(out)]) == 0
    return {path.suffix[1:]: path.read_text(encoding="utf-8") for path in out.glob("report.*")}


def cells(files, student=None):
    """The lines of report.csv by learner, method, its parameters and further settings, for one student."""
    rows = csv.DictReader(io.StringIO(files["csv"]))
    keys = ("learner_name", "KD_method", "kd_prompt_param", "settings")
    return {tuple(row[key] for key in keys): row for row in rows if student in (None, row["s_model"])}


def test_seeds_are_joined_and_all_else_is_told_apart(tmp_path):
    other_parameters = {"method": "KD_Token", "kd_prompt_param": [1, 6]}
    other_data = {"data": DATA | {"class_names_sha256": "b" * 64}}
    changes = [{}, {"lr": 0.2}, {"method": "KD_Token"}, other_parameters, {"tasks": 3}, other_data]
    for number, change in enumerate(changes):
        put(tmp_path / f"runs/{number}", **change)
    put(tmp_path / "runs/second seed", seed=2, final=62.0)
    found = cells(report(tmp_path / "runs", out=tmp_path / "out"))
    assert sorted(row["n"] for row in found.values()) == ["1"] * 5 + ["2"]
    joined = found["L2P", "KD", "", "class_names_sha256 aaaaaaaaaaaa, lr 0.1, tasks 2"]
    assert (joined["n"], joined["seeds"]) == ("2", "1 2")
    assert float(joined["student_final_average_accuracy_mean"]) == 61.0
    assert float(joined["student_final_average_accuracy_std"]) == pytest.approx(2**0.5, rel=1e-5)
    assert float(joined["student_forgetting_mean"]) == 0.5
    assert {param for _, method, param, _ in found if method == "KD_Token"} == {"1 6", "4 6"}


def test_paper_beside_ours(tmp_path):
    put(tmp_path / "runs/a", learner_name="CODAPrompt", final=84.0, **PAPERS)
    full_name = PAPERS | {"t_model": "vit_base_patch16_224.augreg_in21k_ft_in1k"}
    put(tmp_path / "runs/b", learner_name="CODAPrompt", method="KD_Token", kd_prompt_param=[12, 6], **full_name)
    put(tmp_path / "runs/c", learner_name="Mine", method="MyKD", **PAPERS)
    files = report(tmp_path / "runs", out=tmp_path / "out")
    assert files["csv"].count("\n") == 1 + 8 * 7 + 1  # all rows of the data set, and the learner of our own
    assert list(cells(files))[-1][:2] == ("Mine", "MyKD")
    found = cells(files, PAPERS["s_model"])
    ours = found["CODAPrompt", "KD", "", ""]
    assert (ours["paper_accuracy"], ours["paper_forgetting"]) == ("83.03", "7.24")
    assert float(ours["difference_accuracy"]) == pytest.approx(0.97)
    assert float(ours["difference_forgetting"]) == pytest.approx(0.9 - 7.24)
    papers = {row["kd_prompt_param"]: row["paper_accuracy"] for key, row in found.items() if key[0] == "APT"}
    assert (papers["1 6"], papers["12 6"], found["APT", "none", "", ""]["n"]) == ("83.81", "84.28", "0")
    assert found["CODAPrompt", "KD_Token", "12 6", ""]["difference_forgetting"] != ""
    assert (found["L2P", "DKD", "", ""]["n"], found["L2P", "ReviewKD", "", ""]["paper_accuracy"]) == ("0", "78.5")
    for text in (files["md"], files["html"]):
        assert "paper 83.03 / 7.24" in text and "+0.97 / −6.34" in text
        assert "authors' project page".replace("'", "&#x27;" if text is files["html"] else "'") in text
    assert r"\\paper 83.03 / 7.24\\diff. +0.97 / $-$6.34" in files["tex"] and "ImageNet" not in files["tex"]


def test_only_runs_like_the_papers_are_compared_with_it(tmp_path):
    authors, seeded = ({"dataset": "ImageNet_R", "data": DATA | {"split": split}} for split in ("authors", "seeded"))
    for change in (authors, seeded, {"tasks": 2}, {"validation": True}, {"class_order": "shuffled"}):
        folder = put(tmp_path / str(change)[:60], **PAPERS | change)
        row = cells(report(folder, out=tmp_path / "out"), PAPERS["s_model"])["L2P", "KD", "", ""]
        assert row["paper_accuracy"] != "" and (row["difference_accuracy"] != "") == (change == authors)


def test_gain_over_no_distillation_is_paired_by_seed(tmp_path):
    for seed, none, kd in ((1, 50.0, 52.0), (2, 60.0, 63.0)):
        put(tmp_path / f"runs/none-{seed}", method="none", seed=seed, final=none)
        put(tmp_path / f"runs/kd-{seed}", seed=seed, final=kd)
    put(tmp_path / "runs/kd-3", seed=3, final=99.0)  # has no partner
    files = report(tmp_path / "runs", out=tmp_path / "out")
    row = cells(files)["L2P", "KD", "", ""]
    assert (row["gain_over_none_mean"], row["gain_over_none_n"]) == ("2.5", "2")
    assert float(row["gain_over_none_se"]) == pytest.approx(0.5)
    assert "+2.50 ± 0.50 (n = 2)" in files["md"] and "+2.50 ± 0.50 (n = 2)" in files["html"]
    assert "](curves-1.png)" in files["md"] and (tmp_path / "out/curves-1.png").read_bytes() == b"picture"


def test_best_of_a_row_is_among_the_cells_with_the_most_seeds(tmp_path):
    for seed in (1, 2):
        put(tmp_path / f"runs/kd-{seed}", seed=seed, final=60.0)
        put(tmp_path / f"runs/dkd-{seed}", seed=seed, final=61.0, method="DKD")
    put(tmp_path / "runs/none", method="none", final=99.0)
    files = report(tmp_path / "runs", out=tmp_path / "out")
    assert re.findall(r"\*\*(.*?)\*\*", files["md"]) == ["61.00 ± 0.00"]
    assert re.findall(r'class="best">(.*?)<', files["html"]) == ["61.00 ± 0.00"]
    assert files["tex"].count(r"\textbf{61.00$") == files["tex"].count(r"\textbf") == 1
    assert files["tex"].count(r"$_{\pm 0.00}$\\(n = 2)") == 2


def test_unfinished_runs_are_marked_and_do_not_count(tmp_path):
    put(tmp_path / "runs/a", seed=1, tasks=5)
    folder = put(tmp_path / "runs/b", seed=2, final=90.0, tasks=5, done=3)
    timing = {"total_seconds": 3700, "phases": [{"phase": "student"}]}
    (folder / "Results/timing.json").write_text(json.dumps(timing))
    files = report(tmp_path / "runs", out=tmp_path / "out")
    row = cells(files)["L2P", "KD", "", ""]
    assert (row["n"], row["unfinished"], row["student_final_average_accuracy_mean"]) == ("1", "1", "60")
    assert all("seed 2 unfinished: 3 of 5 tasks" in files[kind] for kind in ("md", "html", "tex"))
    for text in (files["md"], files["html"]):
        assert "1:01:40 (student only)" in text  # the teacher is another run's


def test_cut_runs_are_marked_and_shared_settings_are_in_one_line(tmp_path):
    for seed, lr in ((1, 0.1), (2, 0.2)):
        put(tmp_path / f"runs/repeat/seed-{seed}", seed=seed, tasks=3, stream_tasks=10, lr=lr, batch_size=16)
    files = report(tmp_path / "runs", out=tmp_path / "out")
    assert all(files[kind].count("3 of 10 tasks") == number for kind, number in {"md": 4, "html": 4, "tex": 2}.items())
    about = next(line for line in files["md"].splitlines() if line.startswith("All runs: "))
    assert r"batch\_size 16" in about and "tasks 3" in about and "lr" not in about
    row = cells(report(put(tmp_path / "cut", stream_tasks=20, **PAPERS), out=tmp_path / "out"))
    assert row["L2P", "KD", "", ""]["difference_accuracy"] == ""  # 10 tasks, but not the paper's


def test_damaged_and_foreign_folders_are_listed(tmp_path):
    runs = tmp_path / "runs"
    good = (put(runs / "good") / "Results/metrics.json").read_bytes()
    matrix = json.loads(good)
    matrix["student"]["accuracy_matrix"] = [[1.0], [2.0]]
    broken = {"empty": b"", "half": good[:100], "latin": b'{"format": "\xe9"}', "other": b'{"format": 9}'}
    broken |= {"list": b"[]", "lacks": b'{"format": 1}', "matrix": json.dumps(matrix).encode()}
    for name, content in broken.items():
        (runs / name / "Results").mkdir(parents=True)
        (runs / name / "Results/metrics.json").write_bytes(content)
    (runs / "started").mkdir()
    (runs / "started/args.yaml").touch()
    (runs / "args.yaml").touch()  # a folder of --repeat is no run
    files = report(runs, out=runs / "report")
    assert files == report(runs, out=runs / "report")  # the same bytes
    listed = re.findall(r"^\| \S*/(\w+) \| (\S+)", files["md"].partition("## Folders not used")[2], re.MULTILINE)
    assert dict(listed) == dict.fromkeys(broken, "Results/metrics.json") | {"started": "has"}
    assert len(cells(files)) == 1 and "no task was finished" in files["html"]


def test_a_run_counts_once_and_its_measures_are_computed_again(tmp_path):
    path = put(tmp_path / "runs/a", tasks=3) / "Results" / "metrics.json"
    path.write_text(path.read_text().replace('"final_average_accuracy": 60.0', '"final_average_accuracy": 99.0'))
    assert read_run(tmp_path / "runs/a").accuracy == 60.0
    put(tmp_path / "runs/b", tasks=3, done=1)  # same settings and seed, not as far
    (tmp_path / "runs/kept.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_run(tmp_path / "runs/kept.json.gz").identity == read_run(tmp_path / "runs/a").identity
    runs, unused = find_runs([tmp_path, tmp_path / "runs", tmp_path / "runs/a"])
    assert len(runs) == 1 and runs[0].complete
    assert [reason.partition(" of ")[0] for _, reason in unused] == ["has the settings and the seed"] * 2


def test_text_from_folders_is_escaped(tmp_path):
    put(tmp_path / "runs/formula", learner_name="=1+1")
    evil = "<script>alert('x')</script>|$\\frac{&%_#~^`*\udce9"
    for number, lr in enumerate((1, 2, evil)):
        put(tmp_path / f"runs/a<b>|$x{number}", learner_name=evil, method=evil + "2", dataset=evil, lr=lr)
    files = report(tmp_path / "runs", out=tmp_path / "out")
    assert ",'=1+1," in files["csv"]  # no formula of a spreadsheet
    assert "<script" not in files["html"] and "<b>|" not in files["html"]
    assert not re.search(r"(?<!\\)<script", files["md"])
    table = [line for line in files["md"].splitlines() if line.startswith("| ") and "script" in line]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[1:3]}) == 1
    assert not re.search(r"(?<!\\)[&%#_](?=script|~|\^)", files["tex"])


def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(put(tmp_path / "a"))
    mistakes = {"": "required: DIR", "nowhere": "there is no run in nowhere", "empty": "there is no run in empty"}
    mistakes[". --out Results/metrics.json"] = "--out Results/metrics.json cannot be written"
    (tmp_path / "a/empty").mkdir()
    for arguments, words in mistakes.items():
        with pytest.raises(SystemExit, match="2"):
            main(arguments.split())
        assert words in capsys.readouterr().err and not (tmp_path / "a/report").exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>addEventListener("load", () => {
  const edges = [...document.querySelectorAll("table, td, img")].map(e => e.getBoundingClientRect().right);
  const pictures = [...document.images].filter(e => e.naturalWidth > 500 && e.width >= 300 && e.height > 200);
  parent.document.title = JSON.stringify([document.documentElement.scrollWidth, Math.max(...edges), pictures.length]);
})</script>"""


def browse(tmp_path, page):
    """Standard output (the page as loaded) and error of a headless Chromium."""
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars "
    flags += "--dump-dom --allow-file-access-from-files --enable-logging=stderr --virtual-time-budget=5000"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}", "--window-size=1400,900", page.as_uri()]
    environment = {**os.environ, "HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    return result.stdout, result.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the page was not opened in a browser")
def test_page_in_a_browser(tmp_path):
    """It asks for nothing, has no error on the console, and shows tables and pictures at any width."""
    for seed, method in ((seed, method) for seed in (1, 2) for method in ("none", "KD", "KD_Token")):
        put(tmp_path / f"runs/{method}-{seed}", seed=seed, final=80.0 + seed, method=method, **PAPERS)
    put(tmp_path / "runs/cut", learner_name="APT", stream_tasks=20, **PAPERS)
    put(tmp_path / "runs/a rather long name of a folder & more" / ("x" * 60), done=1)
    (tmp_path / "runs/foreign").mkdir()
    text, out = report(tmp_path / "runs", out=tmp_path / "out")["html"], tmp_path / "out"
    assert "CONSOLE" not in browse(tmp_path, out / "report.html")[1]  # where a request that its policy forbids would be
    targets = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>]*)""", text)
    assert len(targets) == 4 and all(target.startswith("data:") for target in targets)
    # The page's policy forbids the script that measures, so this copy has none; a frame gives the width, since
    # Chromium's own window may not be narrow.
    (out / "copy.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</head>", MEASURE + "</head>"))
    for width in (1280, 400):
        frame = f'<title></title><iframe src="copy.html" style="border:0;width:{width}px;height:900px"></iframe>'
        (out / "frame.html").write_text(frame)
        title = re.search("<title>(.*?)</title>", browse(tmp_path, out / "frame.html")[0])[1]
        scroll, right, pictures = json.loads(title)
        assert scroll <= width and right <= width + 1 and pictures == 3
