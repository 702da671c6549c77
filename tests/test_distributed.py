"""Whole runs in several processes: what comes out, what is written, and how they end."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run
from learners import check
from tests import runs
from tests.processes import ROOT, Group
from utils.checkpoint import RunFolder, RunLock
from utils.parallel import build_parallel, leave_group


def train(*command_lines):
    """``run.py`` with the one command line, or with that of this process's rank."""
    with runs.quick():
        sys.exit(run.main(command_lines[int(os.environ["RANK"]) % len(command_lines)]))


def train_in_group(size, *command_lines):
    """Exit codes and outputs, by rank."""
    with Group(size, train, *command_lines) as group:
        codes, _, outputs = zip(*group.outcomes(), strict=True)
    return list(codes), outputs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Configuration of a run of a second, and the folder of one that a single process has finished."""
    root = tmp_path_factory.mktemp("small")
    config = runs.make(root)
    with runs.quick():
        assert run.main(runs.arguments(config, root / "alone")) == 0
    return config, root / "alone"


def metrics_of(folder):
    return json.loads((folder / "Results/metrics.json").read_text())


def assert_same_results(folder, expected):
    """The same accuracies, and losses equal but for what another order of sums does to them."""
    ours, theirs = metrics_of(folder), metrics_of(expected)
    for role in ("teacher", "student"):
        assert ours[role] == theirs[role]
        for own_task, task in zip(ours["losses"][role], theirs["losses"][role], strict=True):
            for own_epoch, epoch in zip(own_task, task, strict=True):
                assert own_epoch == pytest.approx(epoch, rel=1e-2, abs=1e-3)
        for own_task, task in zip(ours["prompt_usage"][role], theirs["prompt_usage"][role], strict=True):
            for layer, values in task.items():
                assert own_task[layer] == pytest.approx(values, rel=1e-2, abs=1e-3)
    for name in ("Results/acc.csv", "Results/acc_s.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("size", [2, 4])
def test_processes_learn_what_one_learns(size, small, tmp_path):
    """The six test images of a task do not divide by four."""
    config, alone = small
    codes, outputs = train_in_group(size, runs.arguments(config, tmp_path / "run"))
    assert codes == [0] * size, outputs
    assert_same_results(tmp_path / "run", alone)
    assert set(outputs[1:]) == {""}
    assert runs.snapshot(tmp_path / "run").keys() == runs.snapshot(alone).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_repeated_runs_share_one_group(small, tmp_path):
    codes, outputs = train_in_group(2, runs.arguments(small[0], tmp_path / "run", "--repeat", 2, "--max_task", 1))
    assert codes == [0, 0], outputs
    assert json.loads((tmp_path / "run/repeat.json").read_text())["seeds"] == [1, 2]
    assert "2 seeds" in outputs[0] and outputs[1] == ""


def test_processes_share_the_teachers_of_another_run(small, tmp_path):
    config, alone = small
    command = runs.arguments(config, tmp_path / "run", "--KD_method", "KD_Token", "--teacher_from", alone)
    codes, outputs = train_in_group(2, command)
    assert codes == [0, 0], outputs
    assert outputs[0].count("teacher taken from") == 2 and outputs[1] == ""
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(alone)
    assert ours["teacher"] == theirs["teacher"] and ours["losses"]["teacher"] == theirs["losses"]["teacher"]
    for task in (1, 2):
        name = f"models/task-{task}/T_class.pth"
        assert (tmp_path / "run" / name).read_bytes() == (alone / name).read_bytes()


def test_what_is_no_training_runs_in_the_first_process(small, tmp_path):
    config, alone = small
    shutil.copytree(alone, tmp_path / "run")
    codes, outputs = train_in_group(2, ["--eval_only", "--log_dir", str(tmp_path / "run"), "--gpuid", "-1"])
    assert codes == [0, 0], outputs
    assert "accuracy matrices equal" in outputs[0] and outputs[1] == ""


# -------------------------------------------------------------------------------------- ends before the start


def test_finished_run_ends_all_processes(small, tmp_path):
    config, alone = small
    shutil.copytree(alone, tmp_path / "run")
    before = runs.snapshot(tmp_path / "run")
    codes, outputs = train_in_group(2, runs.arguments(config, tmp_path / "run"))
    assert codes == [0, 0], outputs
    assert "holds a finished run" in outputs[0] and outputs[1] == ""
    assert runs.snapshot(tmp_path / "run") == before


def test_other_settings_are_refused_by_all_processes(small, tmp_path):
    config, alone = small
    shutil.copytree(alone, tmp_path / "run")
    codes, outputs = train_in_group(2, runs.arguments(config, tmp_path / "run", "--lr", 0.5))
    assert codes == [2, 2]
    assert "other settings (lr 0.01 -> 0.5)" in outputs[0] and outputs[1] == ""


def test_folder_in_use_is_refused_by_all_processes(small, tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"):
        codes, outputs = train_in_group(2, runs.arguments(small[0], tmp_path / "run"))
    assert codes == [2, 2]
    assert f"in use by process {os.getpid()}" in outputs[0] and outputs[1] == ""


def test_teachers_of_other_data_are_refused_by_all_processes(small, tmp_path):
    """Which the first process finds out when all have built their parts."""
    config, alone = small
    shutil.copytree(alone, tmp_path / "other")
    folder = RunFolder(tmp_path / "other")
    folder.open()
    facts = json.loads(folder.read("classes.json")) | {"train_images": [1, 1]}
    folder.commit({"classes.json": json.dumps(facts).encode()}, complete=True)
    command = runs.arguments(config, tmp_path / "run", "--KD_method", "KD_Token", "--teacher_from", tmp_path / "other")
    codes, outputs = train_in_group(2, command)
    assert codes == [2, 2], outputs
    assert "trained on other data or backbones (train_images differ)" in outputs[0] and outputs[1] == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, words", [
    (["--random_s", "7"], "process 1 has other settings than process 0"),
    (["--log_interval", "3"], "process 1 has other --log_interval than process 0"),
    (["--s_weights", "{root}/teacher.pth"], "process 1 has other settings and backbones than process 0"),
    (["--t_weights", "{root}/small.yaml"], "process 1: "),
])  # fmt: skip
def test_processes_that_would_compute_something_else_are_refused(more, words, small, tmp_path):
    config, _ = small
    command = runs.arguments(config, tmp_path / "run")
    other = command + [word.format(root=config.parent) for word in more]
    codes, outputs = train_in_group(2, command, other)
    assert codes == [2, 2], outputs
    assert words in outputs[0] and outputs[1] == ""
    assert not (tmp_path / "run").exists()


def test_mistakes_in_flags_are_named_once(small, tmp_path):
    codes, outputs = train_in_group(2, runs.arguments(small[0], tmp_path / "run", "--batch_size", 5))
    assert codes == [2, 2]
    assert "--batch_size 5 does not divide by the 2 processes: use 4 or 6" in outputs[0] and outputs[1] == ""


def problems(monkeypatch, gpus=0, **settings):
    monkeypatch.setattr(check, "cuda_devices", lambda: gpus)
    config = check.parse_config(["--config", str(ROOT / "configs/emoji-r_prompt.yaml"), "--log_dir", "unused"]).config()
    return "\n".join(check.check(check.dataclasses.replace(config, **settings)))


def test_processes_without_a_device_of_their_own_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert "RANK is set, but not MASTER_ADDR, MASTER_PORT: start the processes by torchrun" in problems(monkeypatch)
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert problems(monkeypatch) == problems(monkeypatch, gpus=4) == ""
    assert "4 processes on this machine need a GPU each, but there are 2 on this machine" in problems(monkeypatch, 2)
    assert "there are 2 of --gpuid: start at most 2" in problems(monkeypatch, 8, gpuid=(0, 1))
    assert problems(monkeypatch, gpus=2, gpuid=(-1,)) == problems(monkeypatch, gpus=2, device="cpu") == ""
    monkeypatch.setattr(check.sys, "platform", "darwin")
    assert "--device mps works in a single process" in problems(monkeypatch, device="mps")


def test_compiled_steps_need_a_process_for_each_gpu(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    found = problems(monkeypatch, gpus=2, gpuid=(0, 1), compile=True)
    assert "leave it out, or let 2 processes use the GPUs by bash experiments/torchrun.sh 2" in found
    assert problems(monkeypatch, gpus=2, gpuid=(1,), compile=True) == ""


# ------------------------------------------------------------------------------------ ends in the middle

LONGER = ["--schedule", "10"]


@pytest.fixture(scope="module")
def longer(small):
    """A longer run in a single process."""
    config, alone = small
    folder = alone.with_name("longer")
    with runs.quick():
        assert run.main(runs.arguments(config, folder, *LONGER)) == 0
    return config, folder


def assert_goes_on(processes, command, folder, expected):
    """The next start finds the state and ends as a run that nothing has interrupted."""
    codes, outputs = train_in_group(processes, command)
    assert codes == [0] * processes, outputs
    assert "Going on at task" in outputs[0]
    assert_same_results(folder, expected)
    return outputs[0]


@pytest.mark.parametrize("first, then", [(2, 4), (4, 1)])
def test_stopped_run_goes_on_with_another_number_of_processes(first, then, longer, tmp_path):
    config, expected = longer
    command = runs.arguments(config, tmp_path / "run", *LONGER)
    with Group(first, train, command) as group:
        group.wait_for("After task 1/2")
        for rank in range(first):
            group.send(signal.SIGTERM, rank)
        outcomes = group.outcomes(timeout=60)
    assert [outcome.code for outcome in outcomes] == [143] * first, outcomes
    assert "the same command goes on from here" in outcomes[0].output
    assert metrics_of(tmp_path / "run")["tasks_done"] == 1
    assert "Going on at task 2" in assert_goes_on(then, command, tmp_path / "run", expected)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_run_and_the_next_start_goes_on(victim, longer, tmp_path):
    config, expected = longer
    command = runs.arguments(config, tmp_path / "run", *LONGER)
    with Group(2, train, command) as group:
        group.wait_for("After task 1/2")
        group.send(signal.SIGKILL, victim)
        outcomes = group.outcomes(timeout=60)
    assert outcomes[victim].code == -signal.SIGKILL
    assert outcomes[1 - victim].code == 1
    assert f"Process {1 - victim}: another process of this run is gone" in outcomes[1 - victim].output
    assert_goes_on(2, command, tmp_path / "run", expected)


def train_impatiently(command_line):
    build_parallel.__kwdefaults__["timeout_s"] = 10
    train(command_line)


@pytest.mark.parametrize("victim", [0, 1])
def test_hanging_process_ends_the_run_and_the_next_start_goes_on(victim, longer, tmp_path):
    config, expected = longer
    command = runs.arguments(config, tmp_path / "run", *LONGER)
    with Group(2, train_impatiently, command) as group:
        group.wait_for("After task 1/2")
        group.send(signal.SIGSTOP, victim)
        (other,) = group.outcomes([1 - victim], timeout=60)
    assert other.code == 1
    assert f"Process {1 - victim}: another process of this run is gone or does not answer" in other.output
    assert_goes_on(2, command, tmp_path / "run", expected)


# ------------------------------------------------------------------------------------------ several hosts


def move_to_host(names):
    """Put this process into the network namespace of its rank."""
    with open(f"/run/netns/{names[int(os.environ['RANK'])]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")


def on_host(names, interface):
    """Join the group from a host of this process's own, and measure what goes over the network."""
    move_to_host(names)
    from tests.utils.test_parallel import VARIANTS, build, compare, small

    where = build_parallel("cpu", None, timeout_s=60)
    worst, _, learned = compare(VARIANTS[0], where)
    phase = build(VARIANTS[1], where).begin_phase("student", small.classes_of(0))
    trained = sum(parameter.numel() * parameter.element_size() for parameter in phase.parameters)
    images, targets = small.batch_of(0, torch.float64)
    volumes = []
    for _ in range(6):
        before = bytes_sent(interface)
        phase.train_step(images, targets)
        where.gather(None)
        volumes.append(bytes_sent(interface) - before)
    leave_group()
    return worst, learned, trained, sorted(volumes)[3]


def bytes_sent(interface):
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith(f"{interface}:"))


@pytest.fixture
def hosts():
    """Two network namespaces that see each other through a cable and nothing else."""
    names = [f"cdl{os.getpid()}{letter}" for letter in "ab"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_hosts_exchange_the_trained_parameters_and_nothing_else(hosts):
    with Group(2, on_host, hosts, "cable0", MASTER_ADDR="10.77.0.1") as group:
        outcomes = group.outcomes()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    for worst, learned, trained, volume in (outcome.result for outcome in outcomes):
        assert worst < 1e-9
        assert learned == outcomes[0].result[1]
        # Each of two hosts sends as many bytes as it has gradients, and headers of packets and messages.
        assert trained < volume < 1.05 * trained + 6_000


def train_on_host(names, command_line):
    move_to_host(names)
    train_impatiently(command_line)


def test_a_run_on_two_hosts_ends_when_their_cable_is_pulled_and_goes_on(hosts, longer, tmp_path):
    """Nobody says that the connection is gone: each host finds out by the other's silence."""
    config, expected = longer
    command = runs.arguments(config, tmp_path / "run", *LONGER)
    with Group(2, train_on_host, hosts, command, MASTER_ADDR="10.77.0.1") as group:
        group.wait_for("After task 1/2")
        subprocess.run(["ip", "-n", hosts[0], "link", "set", "cable0", "down"], check=True)
        outcomes = group.outcomes(timeout=60)
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 1
        assert f"Process {rank}: another process of this run is gone or does not answer" in outcome.output
    subprocess.run(["ip", "-n", hosts[0], "link", "set", "cable0", "up"], check=True)
    with Group(2, train_on_host, hosts, command, MASTER_ADDR="10.77.0.1") as group:
        outcomes = group.outcomes()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "Going on at task" in outcomes[0].output
    assert_same_results(tmp_path / "run", expected)


def join_from_host(names):
    move_to_host(names)
    build_parallel("cpu", None, timeout_s=2)


def test_hosts_that_do_not_find_each_other_end(hosts):
    """gloo itself would wait five times its timeout."""
    with Group(2, join_from_host, hosts, MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME="lo") as group:
        outcomes = group.outcomes(timeout=60)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    # Either gloo gives up first or the timer; which of them for which process depends on who came first.
    for rank, outcome in enumerate(outcomes):
        reasons = ("connectFullMesh failed", f"Process {rank}: the processes of this run have not found each other")
        assert any(reason in outcome.output for reason in reasons), outcome.output


# ----------------------------------------------------------------------------------------------- launchers


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes through Linux's /proc")
def test_torchrun_ends_with_a_killed_process_and_goes_on(longer, tmp_path):
    """The launcher itself, which takes long to load: all of a run's life in one test."""
    config, expected = longer
    script = str(ROOT / "experiments/torchrun.sh")
    command = ["bash", script, "2", *runs.arguments(config, tmp_path / "run", *LONGER)]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    joined = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **joined) as call:
        for line in call.stdout:
            if "After task 1/2" in line:
                break
        children = Path(f"/proc/{call.pid}/task/{call.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        rest = call.stdout.read()
    assert call.returncode == 1 and "another process of this run is gone" in rest, rest
    done = subprocess.run(command, env=environment, check=False, **joined)
    assert done.returncode == 0 and "Going on at task 2" in done.stdout, done.stdout
    assert_same_results(tmp_path / "run", expected)


# An interpreter that cannot be taken apart, as if one of gloo's threads were in the way.
CANNOT_BE_TAKEN_APART = """
import atexit, os, runpy, sys
atexit.register(os.abort)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("word, code", [("--help", 0), ("--no_such_flag", 2)])
def test_process_of_a_group_ends_without_taking_the_interpreter_apart(word, code):
    command = [sys.executable, "-c", CANNOT_BE_TAKEN_APART, str(ROOT / "run.py"), word]
    environment = {**os.environ, "RANK": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and (done.stdout or done.stderr), done


def test_an_error_that_nobody_foresaw_ends_a_process_of_a_group_with_1():
    call = "import learners.check; learners.check.help_page = lambda: 1 / 0"
    command = [sys.executable, "-c", f"{call}\n{CANNOT_BE_TAKEN_APART}", str(ROOT / "run.py"), "--help"]
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr, done


SRUN = r"""#!/bin/bash
# srun for three tasks: runs the command in each and hands SIGTERM on; the highest exit code is its own.
while [ "${1#--}" != "$1" ]; do
    case $1 in --wait=*) echo "srun $1" >"$CALLS.srun" ;; esac
    shift
done
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for task in 0 1 2; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=3 "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    code=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
    [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
"""
SCONTROL = r"""#!/bin/sh
[ "$1 $2" = "show hostnames" ] && printf 'node7\nnode8\n' || echo "$@" >>"$CALLS"
"""
PYTHON = r"""#!/bin/bash
# A Python that writes down what it is to do, and then does as ENDS says: ends with that code, or waits for SIGTERM.
trap 'echo saved >>"$CALLS"; exit 143' TERM
printf 'rank %s of %s, %s on its node, %s:%s, %s threads, [%s]\n' "$RANK" "$WORLD_SIZE" "$LOCAL_RANK" "$MASTER_ADDR" \
    "$MASTER_PORT" "$OMP_NUM_THREADS" "$*" >>"$CALLS"
[ "$ENDS" = wait ] || { [ "$RANK" = 1 ] && exit "$ENDS"; exit 0; }
while :; do sleep 0.05; done
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the job script as SLURM does: a copy of it, without the project around."""
    tools, project = tmp_path / "bin", tmp_path / "my project"
    tools.mkdir()
    project.mkdir()
    (project / "run.py").touch()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    shutil.copy(ROOT / "experiments/slurm.sbatch", tmp_path / "slurm_script")
    calls = tmp_path / "calls"

    def start(ends, *words, **environment):
        calls.write_text("")
        variables = {"SLURM_SUBMIT_DIR": project, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": 4000123,
                     "SLURM_CPUS_PER_TASK": 4, "CALLS": calls, "ENDS": ends, "PYTHON": tools / "python",
                     "PATH": f"{tools}:{os.environ['PATH']}", **environment}  # fmt: skip
        return subprocess.Popen(["bash", str(tmp_path / "slurm_script"), "--log_dir", "a b", *words], cwd=project,
                                env={name: str(value) for name, value in variables.items()},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    start.calls = lambda: calls.read_text().splitlines()
    start.project = project
    return start


def test_slurm_starts_a_process_for_each_task(slurm):
    job = slurm(ends=0)
    assert job.wait(30) == 0, job.stdout.read()
    assert sorted(slurm.calls()) == [
        f"rank {rank} of 3, {rank % 2} on its node, node7:20123, 4 threads, [-u {slurm.project}/run.py --log_dir a b]"
        for rank in range(3)
    ]


@pytest.mark.parametrize("words, seconds", [([], 360), (["--eval_only"], 0)])
def test_slurm_gives_an_evaluation_by_one_task_any_time(words, seconds, slurm, tmp_path):
    assert slurm(0, *words).wait(30) == 0
    assert (tmp_path / "calls.srun").read_text() == f"srun --wait={seconds}\n"


@pytest.mark.parametrize("ends, seconds, again", [(2, 900, False), (1, 900, False), (137, 900, True), (137, 5, False),
                                                  (143, 900, False)])  # fmt: skip
def test_slurm_queues_again_after_a_death(ends, seconds, again, slurm):
    """Not after what would happen again: refused or failed training, or a death soon after the start."""
    job = slurm(ends=ends, SECONDS=seconds)
    assert job.wait(30) == ends
    assert ("requeue 4000123" in slurm.calls()) == again


def test_slurm_queues_again_when_time_is_over(slurm):
    job = slurm(ends="wait")
    while len(slurm.calls()) < 3:
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 143
    assert slurm.calls()[3:] == ["saved"] * 3 + ["requeue 4000123"]
