"""Several processes train as one does, through the door.

Two processes with four CPU devices each, against one with eight: the same losses and
parameters, one set of files, and either goes on where the other stopped.
"""

import json
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import training_city
from orbax.checkpoint import v1 as ocp

from cityrag_jax.checkpoint import latest_model, parameters
from cityrag_jax.training.log import read_metrics

STEPS = 4
LIMIT_S = 600
# Numbers of different device counts come from sums in another order; Muon amplifies
# those of an update a little.
TOLERANCE = dict(rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    training_city.build_city(folder / "city")
    training_city.save_vae(folder / "vae")
    return folder


def command(folder, name, mesh, **changes):
    sizes = zip(("data", "fsdp", "sequence"), mesh, strict=True)
    changes = {f"train__mesh__{axis}": size for axis, size in sizes} | changes
    return training_city.command(
        "toy_city.py:test",
        folder / name,
        data__city=folder / "city",
        model__vae=folder / "vae",
        **dict(train__log_interval=1, train__batch_size=8, train__encode_batch=8),
        **dict(train__fresh=8, train__pool_start=8, eval__clips=8),
        **dict(train__steps=STEPS, train__checkpoint_interval=2, eval__interval=STEPS)
        | changes,
    )


def start(folder, name, mesh, processes, **changes):
    """Start to train in as many processes that share eight devices."""
    arguments = command(folder, name, mesh, **changes)
    environment = training_city.environment(folder, 8 // processes)
    if processes > 1:
        arguments.append("--distributed")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment["JAX_COORDINATOR_ADDRESS"] = address
        environment["JAX_NUM_PROCESSES"] = str(processes)
    return [
        subprocess.Popen(
            arguments,
            cwd=training_city.ROOT,
            env=environment | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]


def run(folder, name, mesh, processes, **changes):
    """Train to the end; give what the processes said."""
    running = start(folder, name, mesh, processes, **changes)
    ended = [process.communicate(timeout=LIMIT_S) for process in running]
    codes = [process.returncode for process in running]
    assert not any(codes), "\n".join(errors[-3000:] for _, errors in ended)
    return ended


def numbers(workdir, name):
    """Of one that went on, the step where it did is there twice."""
    return {x["step"]: x[name] for x in read_metrics(workdir) if name in x}


def assert_same(folder, name, other):
    for key in ("loss", "gradient_norm", "held_out"):
        one, two = (numbers(folder / n, key) for n in (name, other))
        assert two and not two.keys() - one.keys()
        for step in two:
            np.testing.assert_allclose(one[step], two[step], rtol=1e-6, err_msg=key)
    one, two = (
        parameters(latest_model(folder / n).modules["transformer"])
        for n in (name, other)
    )
    for key in one:
        np.testing.assert_allclose(one[key], two[key], err_msg=key, **TOLERANCE)


@pytest.fixture(scope="module")
def alone(folder):
    run(folder, "alone", (1, 8, 1), 1)
    return "alone"


@pytest.mark.parametrize("mesh", [(1, 4, 2), (1, 1, 8)])
@pytest.mark.long
def test_two_processes_train_as_one(folder, alone, mesh):
    """By 1 x 4 x 2 each holds its own clips, by 1 x 1 x 8 both hold all."""
    name = "x".join(map(str, mesh))
    outputs = run(folder, name, mesh, 2)
    assert_same(folder, name, alone)
    assert ["held-out loss" in output for output, _ in outputs] == [True, False]
    files = sorted(path.name for path in (folder / name).iterdir())
    assert files == ["base", "checkpoints", "config.json", "metrics.jsonl", "model"]
    assert [line["step"] for line in read_metrics(folder / name)] == [0, 1, 2, 3, 4]


@pytest.mark.long
def test_another_number_of_processes_goes_on(folder, alone):
    """From a checkpoint of two processes in one, and from one's in two."""
    for origin, mesh, processes in (("1x4x2", (1, 8, 1), 1), (alone, (2, 2, 2), 2)):
        name = f"{origin}-on"
        shutil.copytree(folder / origin, folder / name)
        shutil.rmtree(folder / name / "model")
        shutil.rmtree(folder / name / "checkpoints" / str(STEPS))
        run(folder, name, mesh, processes)
        assert_same(folder, name, alone)


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_behind_the_same_step(folder):
    long = dict(train__steps=1000, train__checkpoint_interval=1000)
    running = start(folder, "told", (1, 4, 2), 2, **long, eval__interval=1000)
    deadline = time.monotonic() + LIMIT_S
    while len(read_metrics(folder / "told")) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [143, 143], ended
    (step,) = [int(path.name) for path in (folder / "told/checkpoints").iterdir()]
    assert f"SIGTERM: saved step {step};" in ended[0][1]
    assert "SIGTERM" not in ended[1][1]


@pytest.mark.long
def test_a_second_training_in_a_workdir_is_refused(folder):
    """While the first lives; when it is killed, the next one takes over at once."""
    long = dict(train__steps=100_000, train__checkpoint_interval=100_000)
    arguments = command(folder, "locked", (1, 1, 1), **long)
    kinds = dict(cwd=training_city.ROOT, env=training_city.environment(folder))
    first = subprocess.Popen(arguments, **kinds, stderr=subprocess.DEVNULL)
    while not (folder / "locked" / "config.json").exists():
        time.sleep(0.1)
    second = training_city.run_trainer(arguments, folder)
    assert f"process {first.pid} on" in second.stderr and second.returncode == 2
    first.kill()
    first.wait()
    assert (folder / "locked" / "lock").exists()
    run(folder, "locked", (1, 1, 1), 1, **long, train__max_seconds=1e-3)
    assert not (folder / "locked" / "lock").exists()


def wait_for_step(workdir, step):
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        lines = read_metrics(workdir)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.05)


@pytest.mark.faults
def test_one_process_killed_or_stuck_ends_all_and_they_go_on_to_the_same_bits(folder):
    """Killed outright, then stopped but alive: named by the others' own watchdog."""
    steps = dict(train__steps=24, eval__interval=24)
    run(folder, "undisturbed", (1, 4, 2), 2, **steps)
    killed = start(folder, "disturbed", (1, 4, 2), 2, **steps)
    wait_for_step(folder / "disturbed", 4)
    killed[1].kill()
    ended = [process.communicate(timeout=120) for process in killed]
    assert killed[0].returncode == 75, ended[0]
    assert "process 1 is lost (its connection broke)" in ended[0][1]
    assert "internal error" not in ended[0][1]
    limit_s = 20.0
    stuck = start(folder, "disturbed", (1, 4, 2), 2, **steps, train__stuck_s=limit_s)
    wait_for_step(folder / "disturbed", 12)
    stuck[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, said = stuck[0].communicate(timeout=120)
    # The last progress lies up to an update before the stop.
    assert limit_s - 5 < time.monotonic() - stopped < limit_s + 10
    stuck[1].kill()
    stuck[1].communicate()
    assert stuck[0].returncode == 75, said
    assert "Traceback" not in said and "stuck is process 1," in said
    run(folder, "disturbed", (1, 4, 2), 2, **steps)
    whole, again = (
        json.loads(note)["digests"]
        for note in (_notes(folder / name, 24) for name in ("undisturbed", "disturbed"))
    )
    assert whole == again


def _notes(workdir, step):
    path = workdir / "checkpoints" / str(step)
    return ocp.load_checkpointables(path, {"notes": None})["notes"]["json"]


@pytest.mark.long
def test_what_is_missing_for_a_start_in_several_processes_is_named(folder):
    arguments = [*command(folder, "none", (1, 1, 1)), "--distributed"]
    ended = training_city.run_trainer(arguments, folder)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "needs JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PRO" in ended.stderr
