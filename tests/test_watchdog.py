"""Who is stuck is named; what goes wrong in a training is said with its cure."""

import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cityrag_jax.commands import command
from cityrag_jax.training import grace, watchdog
from cityrag_jax.training.losses import Losses
from cityrag_jax.training.watchdog import describe_stuck


def places(*counts):
    return {n: {"count": c, "doing": f"doing {c}"} for n, c in enumerate(counts)}


@pytest.mark.parametrize(
    "counts, told",
    [
        ((8, 7, 8), "stuck is process 1, doing 7"),
        ((8, 7, 7), "stuck is process 1, doing 7, process 2, doing 7"),
        ((8, 8), "stuck is all processes, doing 8"),
        ((3,), "stuck is all processes, doing 3"),
    ],
)
def test_processes_behind_the_others_are_the_culprits(counts, told):
    said = describe_stuck(places(*counts), 60.0)
    assert told in said and "60 s" in said and "goes on from the last" in said


def test_who_no_longer_says_anything_is_stuck_though_nobody_is_behind():
    told = places(8, 8, 7)
    told[1]["silent"] = True
    assert "stuck is process 1, doing 8. The" in describe_stuck(told, 60.0)


@pytest.mark.parametrize("mine, peer", [(0, 1), (1, 0)])
def test_a_peer_that_was_heard_of_and_falls_silent_is_named(
    tmp_path, monkeypatch, mine, peer
):
    """One that a killed training left behind was never heard of."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: mine)
    monkeypatch.setattr(watchdog, "LOST_S", 2.5)
    ours = watchdog.Watchdog(tmp_path, 100.0)
    theirs = tmp_path / f"{peer}.json"
    assert ours._lost() is None
    theirs.write_text("{}")
    assert not any(ours._lost() for _ in range(9))
    for time_s in (1, 2, 3):
        os.utime(theirs, (time_s, time_s))
        assert not any(ours._lost() for _ in range(3))
    said = ours._lost()
    assert f"process {peer} is lost" in said and "goes on from the last" in said


def test_a_broken_connection_ends_all_and_names_who_is_silent(
    tmp_path, monkeypatch, capsys
):
    """Of three, process 2 goes on touching its file; the killed one left it behind."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    gone = jax.errors.JaxRuntimeError("Gloo AllGather failed: Connection reset by peer")
    with pytest.raises(jax.errors.JaxRuntimeError):
        with watchdog.Watchdog(tmp_path, 1.0):
            (tmp_path / "1.json").write_text("{}")
            threading.Thread(target=touch_for, args=(tmp_path / "2.json", 1.0)).start()
            time.sleep(0.2)
            raise gone
    said = capsys.readouterr().err
    assert "process 1 is lost (its connection broke)" in said and set(ended) == {75}
    with pytest.raises(ValueError), watchdog.Watchdog(tmp_path, 0.0):
        raise ValueError("bad input")
    assert command.describe_error(gone)[1] == 75
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert command.describe_error(gone)[1] == 70
    assert not capsys.readouterr().err


def touch_for(path, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path.write_text("{}")
        time.sleep(0.02)


def feed(losses, first, values):
    """One call of so many updates, each of two clips named after its step."""
    values = jnp.asarray(values, jnp.float32)
    steps = jnp.arange(first, first + len(values), dtype=jnp.uint32)
    clips = jnp.stack([steps, steps + 4096], axis=1)
    metrics = {"loss": values, "refused": ~jnp.isfinite(values), "clips": clips}
    losses.add(first, metrics)


def test_a_spike_and_a_refused_update_are_named_with_their_clips():
    losses = Losses(patience=3, spike=4.0)
    feed(losses, 0, [1.0] * 30)
    feed(losses, 30, [3.9, 4.1, np.nan, 1.0])
    report = losses.collect()
    assert report["refused"] == 1 and "clips" not in report
    spike, refused = map(str, losses.take_remarks())
    assert spike.startswith("step 31: loss 4.1000 is a spike, usual is 1.0000")
    assert spike.endswith("clips 0000001f 0000101f")
    assert refused == "step 32: loss nan was not finite; clips 00000020 00001020"
    assert not losses.take_remarks()


def test_losses_that_stay_non_finite_end_with_steps_and_clips():
    losses = Losses(patience=3)
    feed(losses, 0, [1.0, np.nan])
    losses.collect()
    feed(losses, 2, [np.nan, np.nan])
    with pytest.raises(FloatingPointError, match="steps 1 to 3") as raised:
        losses.collect()
    assert "step 1: clips 00000001 00001001\n  step 2: clips" in str(raised.value)


def test_a_grace_that_is_too_short_is_said_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(grace, "measure_writing", lambda folder: 1e-6)
    state = {"a": jnp.zeros(1_000_000, jnp.uint8), "b": jax.numpy.zeros(0)}
    assert grace.describe_grace(state, tmp_path, 2.0, 7.1) is None
    said = grace.describe_grace(state, tmp_path, 2.0, 6.9)
    assert "Of the 7 s" in said and "6.0 s" in said and "some 1.0 s" in said
    monkeypatch.undo()
    assert 0 < grace.measure_writing(tmp_path) < 1e-6
    assert not list(tmp_path.iterdir())
