"""Processes that share a list of jobs, are killed, and leave what one alone leaves.

The door runs in other processes, with a random model: what every condition and every
bit of the noise changes.
"""

import json
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import synthetic_city as synthetic
import training_city
from test_generator import DIT, bundle_of_no_zeros

from cityrag_jax.checkpoint import save_bundle
from cityrag_jax.data.video import write_image
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef

FILES = ("video.mp4", "conditions.mp4", "poses.tum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A city, a model, two photos, and paths of 29 m as a file and in words."""
    folder = tmp_path_factory.mktemp("jobs")
    drives = [synthetic.line([0, 0, 2], 0, 100), synthetic.line([1.5, -1, 2], 0, 100)]
    city = synthetic.build(folder / "city", drives)
    save_bundle(folder / "model", bundle_of_no_zeros())
    view = dict(height=64, width=96, fov_deg=65.0)
    photos = city.crops(np.array([10, 30]), np.zeros(2), **view)
    for name, photo in zip("ab", photos, strict=True):
        write_image(folder / f"{name}.png", photo)
    ends = ecef_from_enu(*synthetic.ANCHOR) @ synthetic.line([0.5, 2, 2], 0, 2, 29.3)
    rows = zip(*geodetic_from_ecef(ends[:, :3, 3]), strict=True)
    (folder / "path.csv").write_text("".join(f"{a},{b},{h}\n" for a, b, h in rows))
    return folder


def write_list(folder, count: int, speed_m_s: int = 15) -> list[str]:
    """Write `count` jobs, of two or three clips if slow, and one that is none."""
    jobs = [
        dict(id=f"j{i}", image=f"{'ab'[i % 2]}.png", path="path.csv", seed=i // 4)
        | dict(speed_m_s=speed_m_s + i % 3)
        for i in range(count)
    ]
    wrong = [dict(id="bad", image="none.png", path="path.csv")]
    text = "".join(json.dumps(job) + "\n" for job in [*jobs[:1], *wrong, *jobs[1:]])
    (folder / f"jobs{count}.jsonl").write_text(text)
    return [job["id"] for job in jobs]


DOOR = ("-m", "cityrag_jax.generate")
# The door, which also keeps every clip's frames as they are before a video codes them.
KEEPING = """
import os, runpy
import numpy as np
from cityrag_jax.recording import Recording

commit = Recording._commit

def keep(self, made):
    np.save(os.path.join(os.environ["KEEP"], self.out.stem), made.frames)
    commit(self, made)

Recording._commit = keep
runpy.run_module("cityrag_jax.generate", run_name="__main__", alter_sys=True)
"""


def start(
    folder, out, count: int, *words: str, devices: int = 1, door=DOOR, **environment
):
    given = dict(
        config=f"{training_city.ROOT}/configs/toy_city.py:test",
        checkpoint=folder / "model",
        city=folder / "city",
        jobs=folder / f"jobs{count}.jsonl",
        out=out,
    )
    keys = {"sample.num_steps": 2, "model.transformer.dim": DIT.dim}
    keys["model.transformer.patch"] = DIT.patch
    return subprocess.Popen(
        [
            *(sys.executable, *door),
            *(f"--{name}={value}" for name, value in given.items()),
            *(f"--config.{name}={value}" for name, value in keys.items()),
            *words,
        ],
        cwd=training_city.ROOT,
        env=training_city.environment(folder, devices) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code: int = 3) -> str:
    said, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors[-3000:]
    return said


def bytes_of(out, names) -> dict[str, bytes]:
    paths = [out / "videos" / name / file for name in names for file in FILES]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def logged(out) -> list[tuple[str, str]]:
    lines = [
        x for file in (out / "logs").iterdir() for x in file.read_text().split("\n")
    ]
    told = [json.loads(line) for line in lines if line]
    return sorted((line["id"], line["state"]) for line in told)


@pytest.fixture(scope="module")
def undisturbed(folder):
    """What one process makes of six jobs, two at a time, a device each."""
    names = write_list(folder, 6)
    shared = ("--devices-per-job=1",)
    said = finish(start(folder, folder / "alone", 6, *shared, devices=2))
    assert "6 of 7 videos are in" in said
    return bytes_of(folder / "alone", names)


def check(folder, out, names, wanted):
    """Nothing is lost, nothing made twice, and every byte is the undisturbed one's."""
    assert bytes_of(out, names) == wanted
    told = json.loads((out / "status.json").read_text())
    assert (told["done"], told["waiting"], list(told["failed"])) == (
        len(names),
        0,
        ["bad"],
    )
    states = logged(out)
    assert [name for name, state in states if state == "done"] == sorted(names)
    assert {state for _, state in states} == {"done", "failed"}
    left = [*(out / "work").iterdir(), *(out / "leases").iterdir()]
    assert not left


def kill_at_random(folder, out, count, processes, kills, moments) -> None:
    """Start processes and kill each so often, each time at work or while it starts."""
    running = [start(folder, out, count) for _ in range(processes)]
    for _ in range(kills):
        for place, process in enumerate(running):
            before = set(out.glob("work/*/clips/*"))
            deadline = time.monotonic() + moments.choice([5.0, 120.0])
            while process.poll() is None and time.monotonic() < deadline:
                if set(out.glob("work/*/clips/*")) - before:
                    break
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            running[place] = start(folder, out, count)
    for process in running:
        finish(process)


@pytest.mark.long
def test_two_processes_killed_once_each_lose_nothing(folder, undisturbed):
    out, names = folder / "killed", [f"j{i}" for i in range(6)]
    kill_at_random(folder, out, 6, 2, 1, random.Random(0))
    check(folder, out, names, undisturbed)
    said = finish(start(folder, out, 6))
    assert "clips" not in said and "7 videos" in said  # nothing is done again
    assert len(logged(out)) == 7


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_sixteen_jobs_and_three_kills_of_each_process(folder, processes):
    names = write_list(folder, 16)
    whole = folder / "whole16"
    if not whole.exists():
        finish(start(folder, whole, 16))
    out = folder / f"killed16-{processes}"
    kill_at_random(folder, out, 16, processes, 3, random.Random(processes))
    check(folder, out, names, bytes_of(whole, names))


@pytest.mark.faults
def test_sigterm_parks_every_job(folder, undisturbed):
    out = folder / "parked"
    process = start(folder, out, 6)
    while process.poll() is None and not list(out.glob("work/*/clips/0000")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in finish(process, 143)
    assert json.loads((out / "status.json").read_text())["waiting"] > 0
    finish(start(folder, out, 6))
    names = [f"j{i}" for i in range(6)]
    assert bytes_of(out, names) == undisturbed


@pytest.mark.long
def test_a_job_spans_joined_processes(folder):
    """Two processes of two devices give what one process of four does.

    Their sums are taken in another order, so that a value may come out as its
    neighbour. Frames before they are coded: the video rounds whole blocks by such a
    value. Videos of one clip, since the next one starts from its last frame, and random
    weights make tens of it.
    """
    names = write_list(folder, 2, speed_m_s=40)
    words = ("--mesh=sequence:4",)
    kept = [folder / "kept_four", folder / "kept_joined"]
    for path in kept:
        path.mkdir()
    alone, both = (dict(door=("-c", KEEPING), KEEP=str(path)) for path in kept)
    finish(start(folder, folder / "four", 2, *words, devices=4, **alone))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    out = folder / "joined"
    told = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2")
    processes = [
        start(
            *(folder, out, 2, "--distributed", *words),
            **told | both | dict(devices=2, JAX_PROCESS_ID=str(number)),
        )
        for number in range(2)
    ]
    said = [finish(process) for process in processes]
    assert "2 of 3 videos" in said[0] and "job j" not in said[1]
    for name in names:
        wanted, made = (np.load(path / f"{name}.npy").astype(int) for path in kept)
        difference = np.abs(made - wanted)
        assert len(made) < 9 and wanted.std() > 10
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
        assert (out / "videos" / name / "video.mp4").exists()
