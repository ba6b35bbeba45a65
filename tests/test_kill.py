"""A training killed at any moment and started again ends bitwise where it would have.

The trainer runs in another process and is killed by SIGKILL: at random moments, and
between start and commit of a save. The test compares every stored array's digest.
"""

import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest
import training_city
from orbax.checkpoint import v1 as ocp

from cityrag_jax.checkpoint import TrainingCheckpoints
from cityrag_jax.training.log import read_metrics

STEPS = 24
WAIT_S = 900.0  # for a save, on the slowest machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    training_city.build_city(folder / "city")
    training_city.save_vae(folder / "vae")
    return folder


def _command(folder, workdir, pool, **changes):
    often = dict(train__checkpoint_interval=3, train__log_interval=1)
    often |= dict(train__steps=STEPS, eval__interval=12)
    return training_city.command(
        "toy_city.py:test",
        workdir,
        data__city=folder / "city",
        model__vae=folder / "vae",
        train__pool=pool,
        **often | changes,
    )


def _start(folder, workdir, pool, stderr=subprocess.DEVNULL, **changes):
    return subprocess.Popen(
        _command(folder, workdir, pool, **changes),
        cwd=training_city.ROOT,
        env=training_city.environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
    )


def _kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL


def _finish(folder, workdir, pool, **changes):
    command = _command(folder, workdir, pool, **changes)
    result = training_city.run_trainer(command, folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def _digests(workdir, step=STEPS):
    """Checksums of all arrays: parameters, average, optimiser, step."""
    path = workdir / "checkpoints" / str(step)
    notes = ocp.load_checkpointables(path, {"notes": None})["notes"]
    return json.loads(notes["json"])["digests"]


def _saves(workdir):
    folder = workdir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    whole = sorted(int(n) for n in names if n.isdigit())
    return whole, [n for n in names if not n.isdigit()]


def _left(workdir):
    """Say what a kill left: whole saves, and whether one was being written."""
    whole, unfinished = _saves(workdir)
    return f"saved {whole}, unfinished {unfinished}"


def _truth(folder, pool):
    """Digests of an uninterrupted training from a pool, or from a stream (0)."""
    whole = folder / f"whole{pool}"
    if not (whole / "model").exists():
        _finish(folder, whole, pool)
    return _digests(whole)


@pytest.mark.parametrize(
    "pool, kills",
    [
        pytest.param(16, 3, marks=pytest.mark.long),
        pytest.param(0, 3, marks=pytest.mark.long),
        # Half an hour on two idle cores.
        pytest.param(16, 50, marks=[pytest.mark.faults, pytest.mark.timeout(14_400)]),
    ],
)
def test_killed_at_random_moments(folder, pool, kills):
    """While it starts, between steps, in saves; one that ends is begun anew."""
    truth = _truth(folder, pool)
    workdir = folder / f"random{pool}"
    moments, done, behind, ends = random.Random(pool), 0, 0, 0
    while done < kills:
        process = _start(folder, workdir, pool)
        before, deadline = _saves(workdir)[0][-1:], time.monotonic() + WAIT_S
        if done % 2:  # wait for a save, or all kills would hit the start
            while process.poll() is None and time.monotonic() < deadline:
                if _saves(workdir)[0][-1:] != before:
                    break
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1.0))
        else:
            time.sleep(moments.uniform(0, 12.0))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            done += 1
            behind += _saves(workdir)[0][-1:] > before
            print(f"kill {done}, {_left(workdir)}", flush=True)
            continue
        assert process.returncode == 0
        assert _digests(workdir) == truth
        shutil.rmtree(workdir)
        ends += 1
    assert behind >= (done - 1) // 2  # or a slow machine tests its start alone
    _finish(folder, workdir, pool)
    assert _digests(workdir) == truth
    print(f"{done} kills, {behind} behind a new save, {ends + 1} trainings ended")
    shutil.rmtree(workdir)


@pytest.mark.long
def test_killed_between_start_and_commit_of_a_save(folder):
    workdir = folder / "saving"
    hits = 0
    for wanted in (3, 9, 15):
        process = _start(folder, workdir, 16)
        unfinished = []
        while process.poll() is None and not unfinished:
            # The very first save has nothing to fall back to: a start from scratch.
            unfinished = [
                n for n in _saves(workdir)[1] if int(n.split(".")[0]) >= wanted
            ]
        if process.poll() is not None:
            break
        _kill(process)
        hits += bool(_saves(workdir)[1])
    assert hits >= 2
    _finish(folder, workdir, 16)
    assert _digests(workdir) == _truth(folder, 16)
    assert not _saves(workdir)[1]


@pytest.mark.long
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves_the_running_step_and_says_so(folder, number, code):
    """No interval asks for that checkpoint; the next start goes on from it, bitwise."""
    workdir = folder / f"told{code}"
    rare = dict(train__checkpoint_interval=STEPS, train__log_interval=1)
    process = _start(folder, workdir, 16, subprocess.PIPE, **rare)
    while process.poll() is None and len(read_metrics(workdir)) < 4:
        time.sleep(0.01)
    process.send_signal(number)
    sent = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - sent < 10
    (step,) = _saves(workdir)[0]
    assert 3 <= step < STEPS
    assert said.splitlines()[-1].startswith(f"{number.name}: saved step {step}; the")
    assert "Traceback" not in said and not (workdir / "lock").exists()
    _finish(folder, workdir, 16, **rare)
    assert _digests(workdir) == _truth(folder, 16)


def _limit_files(process, workdir):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))


def _remove_checkpoints(process, workdir):
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)


def _kill_a_data_worker(process, workdir):
    tasks = pathlib.Path(f"/proc/{process.pid}/task")
    children = {int(n) for f in tasks.glob("*/children") for n in f.read_text().split()}
    for child in children:
        if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    "fault, told, changes",
    [
        (
            _limit_files,
            r"step \d+ could not be written \(File too large\); .*ulimit",
            {},
        ),
        (_remove_checkpoints, r"could not be written \(No such file .*is gone", {}),
        (_kill_a_data_worker, r"worker ended .*data\.workers", dict(data__workers=1)),
    ],
    ids=["full", "gone", "worker"],
)
def test_a_fault_of_disk_or_worker_ends_it_in_one_message(folder, fault, told, changes):
    """At once, with cause and cure, and the checkpoint before it is whole."""
    workdir = folder / fault.__name__
    long = dict(train__steps=100_000, eval__interval=100_000) | changes
    process = _start(folder, workdir, 0, subprocess.PIPE, **long)
    while process.poll() is None and not _saves(workdir)[0]:
        time.sleep(0.01)
    fault(process, workdir)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said[-3000:]
    assert "Traceback" not in said and re.search(told, said), said
    if fault is not _remove_checkpoints:
        with TrainingCheckpoints(workdir / "checkpoints") as checkpoints:
            assert checkpoints.read_notes()["next_batch"] == checkpoints.steps[-1]
    assert not (workdir / "lock").exists()
