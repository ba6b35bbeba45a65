"""When a training reports, saves and stops; what it says meanwhile."""

import itertools
import os
import signal
import time

import jax
import jax.numpy as jnp
import pytest
import training_city

from cityrag_jax.training import memory, schedule
from cityrag_jax.training.examples import held_out_examples, open_cities, stream
from cityrag_jax.training.log import TrainingLog, describe_report, describe_time
from cityrag_jax.training.profile import Profile, parse_steps
from cityrag_jax.training.schedule import Schedule, Signals, Stopped, describe_stop


def _config(**changes):
    return training_city.get_config("toy_city", **changes)


def test_reports_and_checkpoints_are_due_at_their_intervals():
    config = _config(train__log_interval=2, train__checkpoint_interval=5)
    due = [Schedule(config, Signals()).after(step) for step in range(1, 21)]
    assert [n for n, d in enumerate(due, 1) if d.save] == [5, 10, 15, 20]
    assert [n for n, d in enumerate(due, 1) if d.evaluate] == [10, 20]
    assert [n for n, d in enumerate(due, 1) if not d.report] == [
        1,
        3,
        7,
        9,
        11,
        13,
        17,
        19,
    ]
    assert [n for n, d in enumerate(due, 1) if d.last] == [20]


def test_minutes_since_the_last_checkpoint_make_one_due(monkeypatch):
    now = itertools.count(step=20.0)  # a look at the clock every 20 s
    monkeypatch.setattr(schedule.time, "monotonic", lambda: next(now))
    config = _config(
        train__checkpoint_minutes=1.0,
        train__checkpoint_interval=1000,
        eval__interval=1000,
    )
    looks = Schedule(config, Signals())
    saved = [step for step in range(1, 11) if looks.after(step).save]
    assert saved == [4, 8]  # behind more than 60 s, and 60 s from then


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_behind_the_running_update_with_a_checkpoint(
    number, code, tmp_path
):
    before = signal.getsignal(number)
    with Signals() as signals:
        looks = Schedule(_config(), signals)
        assert not looks.after(1).save
        os.kill(os.getpid(), number)
        due = looks.after(2)
    assert due.save and due.report and not due.evaluate and due.signal == number
    assert signal.getsignal(number) == before
    stopped = describe_stop(due.signal, 2, [1, 2], tmp_path)
    assert stopped.code == code
    assert str(stopped).startswith(f"{number.name}: saved step 2; the same command")
    assert "not finite" in str(describe_stop(due.signal, 2, [1], tmp_path))


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(Stopped, match="nothing was saved") as error, Signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert error.value.code == 130


def test_a_report_is_a_line_where_there_is_no_terminal(tmp_path, capsys):
    report = dict(loss=0.5, seconds_per_step=2.0, mfu=0.415, data_wait_s=0.25)
    report |= dict(memory_gib=70.04, learning_rate=1e-5, held_out=0.61, refused=2.0)
    with TrainingLog(tmp_path, 0, 1000, tensorboard=False) as log:
        log.report(10, report)
    out, err = capsys.readouterr()
    assert out[8:].strip() == (
        "step 10/1000: loss 0.5000, held-out 0.6100, 2.00 s a step, MFU 41.5%, data "
        "wait 0.25 s, memory 70.0 GiB, rate 1e-05, 2 updates refused: not finite, "
        "33 min left"
    )
    assert time.strptime(out[:8], "%H:%M:%S") and not err
    assert "loss" not in describe_report(1, 2, {}, 0.0)


def test_times_are_said_as_people_say_them():
    seconds = (0.4, 99.0, 100.0, 5000.0, 25320.0, 47 * 3600.0, 158 * 3600.0)
    said = "0 s, 99 s, 2 min, 83 min, 7 h 02 min, 47 h 00 min, 6 d 14 h"
    assert ", ".join(map(describe_time, seconds)) == said


def test_the_updates_of_a_profile_are_traced(tmp_path):
    profile = Profile(tmp_path / "profile", parse_steps("2:3"))
    add = jax.jit(lambda x: x + 1)
    x = add(0)
    for step in range(4):
        profile.before(step, x)
        x = add(x)
        profile.after(step + 1, x)
        assert list(tmp_path.rglob("*.xplane.pb")) == [] or step + 1 >= 3
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("text", ["3", "3:2", "0:2", "a:b", ":4"])
def test_a_profile_that_names_no_updates_is_refused(text):
    with pytest.raises(ValueError, match="--profile"):
        parse_steps(text)


def test_too_little_memory_ends_with_what_to_change():
    """Keys that the config has, values that its check accepts, cheapest first."""
    config = training_city.get_config("cityrag_14b", None)
    with config.unlocked():
        config.train.mesh.update(dict(data=1, fsdp=4, sequence=2))
    error = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes."
    )
    assert memory.is_out_of_memory(error)
    assert not memory.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no"))
    said = str(memory.out_of_memory(error, config))
    order = ["12345 bytes", "micro_batches=2 ", 'keep="()"', "offload=", "sequence=4 "]
    order += ["batch_size (now 32"]
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    config.train.micro_batches = 8  # one clip a device at a time
    config.model.transformer.keep = ()
    config.model.transformer.offload = ("block_input",)
    said = str(memory.out_of_memory(error, config))
    assert "micro_batches" not in said and "keep=" not in said and "offload" not in said


def test_a_training_on_a_few_clips_is_measured_on_the_same(tmp_path):
    city = training_city.build_city(tmp_path / "city")
    config = _config(data__city=str(city), train__overfit=3, train__pool=0)
    sources = open_cities(config.data.city)
    batches = list(itertools.islice(stream(sources, config, 0, None), 3))
    ids = [int(n) for batch in batches for n in batch.clip_id]
    assert ids == (ids[:3] * 4) and len(set(ids)) == 3
    assert (batches[0].frames[0] == batches[0].frames[3]).all()

    def encode(clip):
        return {"frames": jnp.asarray(clip.frames)}

    (held_out,) = held_out_examples(encode, sources, config, None)
    assert (held_out["frames"] == batches[0].frames).all()
    late = next(stream(sources, config, 1, None))
    assert late.clip_id.tolist() == ids[4:8]
