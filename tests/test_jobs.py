"""Lists of jobs: lines, leases, and workers that share a folder.

The model is a painter here: what it paints depends on all that a clip is made of.
"""

import dataclasses
import json

import numpy as np
import pytest
import synthetic_city as synthetic
import training_city
from test_train import get_config

from cityrag_jax import generate as door
from cityrag_jax import leases as leasing
from cityrag_jax.checkpoint import Damaged
from cityrag_jax.data.store import City
from cityrag_jax.data.video import write_image
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.jobs import run as running
from cityrag_jax.jobs.check import check_jobs, describe_check, summarise
from cityrag_jax.jobs.folder import JobsFolder, read_record
from cityrag_jax.jobs.lines import read_lines
from cityrag_jax.jobs.run import Model, run_jobs
from cityrag_jax.request import Order

LATITUDE, LONGITUDE, _ = synthetic.ANCHOR


@pytest.fixture(scope="module")
def city(tmp_path_factory) -> City:
    """A drive north of 30 m, with a photo and a path of twelve metres beside it."""
    folder = tmp_path_factory.mktemp("jobs")
    city = synthetic.build(folder / "city", [synthetic.line([0, 0, 2], 0, 60)])
    write_image(folder / "photo.png", np.full((64, 96, 3), 90, np.uint8))
    ends = ecef_from_enu(*synthetic.ANCHOR) @ synthetic.line([0.5, 2, 2], 0, 2, 12.0)
    rows = zip(*geodetic_from_ecef(ends[:, :3, 3]), strict=True)
    (folder / "path.csv").write_text("".join(f"{a},{b},{h}\n" for a, b, h in rows))
    return city


class Painter:
    """Counts its calls; paints with the seed, the clip's number and its first frame."""

    def __init__(self):
        self.calls = 0

    def __call__(self, clip, seed: int):
        self.calls += 1
        key = [seed, int(clip.clip_id[0]), int(clip.frames.sum())]
        key.append(int(clip.condition.sum()))
        shape = (1, *clip.first_from_camera.shape[1:2], *clip.frames.shape[2:])
        return np.random.default_rng(key).integers(256, size=shape).astype(np.uint8)


class PaintedModel(Model):
    """A model without weights."""

    def __post_init__(self):
        self.painter = Painter()

    weights = "painter"

    def open(self):
        return self.painter

    def serve(self, request):
        return self.painter


@pytest.fixture
def painted(city) -> PaintedModel:
    config = get_config("toy_city", sample__spacing_m=0.5)
    return PaintedModel(config, city.folder, city)


JOB = {"image": "photo.png", "path": "path.csv"}


def write_list(city, jobs, name="jobs.jsonl"):
    """Write a list beside the photo, and read it."""
    file = city.folder.parent / name
    words = [j if isinstance(j, str) else json.dumps(JOB | j) for j in jobs]
    file.write_text("\n".join(words) + "\n")
    return read_lines(file, Order("", seed=7))


def run(out, lines, *models, stopped=lambda: False) -> bool:
    return run_jobs(JobsFolder(out, lines, models[0].made_by()), models, stopped)


def after(looks: int):
    """Give a stop signal that is there from so many looks on."""
    seen = iter(range(10**6))
    return lambda: next(seen) >= looks


def status(out) -> dict:
    return json.loads((out / "status.json").read_text())


def logged(out) -> list[tuple[str, str]]:
    lines = [
        x for file in (out / "logs").iterdir() for x in file.read_text().splitlines()
    ]
    return [(told["id"], told["state"]) for told in map(json.loads, lines)]


def bytes_of(out, name) -> tuple[bytes, ...]:
    files = ("video.mp4", "conditions.mp4", "poses.tum")
    return tuple((out / "videos" / name / file).read_bytes() for file in files)


def test_a_line_has_the_command_lines_options_and_its_own(city):
    job = {"id": "a", "speed_m_s": 4, "sample": {"num_steps": 3, "preset": "draft"}}
    (line,) = write_list(city, ["", "# a comment", job])
    assert (line.number, line.name, line.order.seed) == (3, "a", 7)
    assert line.order.speed_m_s == 4 and line.fault == ""
    assert line.found().image == str(city.folder.parent / "photo.png")
    config = line.configure(get_config("toy_city"))
    assert (config.sample.num_steps, config.sample.preset) == (3, "draft")
    script = {"id": "b", "path": "", "script": "start 1,2 3; forward 4"}
    (line,) = write_list(city, [script])
    assert line.order.script and line.fault == ""


@pytest.mark.parametrize(
    ("job", "fault"),
    [
        ('{"id": "a"', "not JSON"),
        ("[1]", "is no JSON object"),
        ('{"image": "x"}', "id is None; give up to 100 of letters"),
        ({"id": "../a"}, "id is '../a'; give"),
        ({"id": "a", "sed": 3}, "'sed' is no key of a job; is seed"),
        ({"id": "a", "seed": "3"}, "seed is '3'; it must be a int"),
        ({"id": "a", "seed": -3}, "Seed -3 must be from 0"),
        ({"id": "a", "path": ""}, "a path or a script"),
        ({"id": "a", "sample": {"mesh": 1}}, "a job may change num_steps"),
        ({"id": "first"}, "id 'first' is that of line 1 already"),
    ],
)
def test_a_line_that_is_no_job_is_kept_with_its_fault(city, job, fault):
    first, line = write_list(city, [{"id": "first"}, job])
    assert first.fault == "" and fault in line.fault
    assert line.name == "line-000002"


def test_a_list_that_is_none_is_refused(city, tmp_path):
    with pytest.raises(ValueError, match="none.jsonl cannot be read"):
        read_lines(tmp_path / "none.jsonl", Order(""))
    with pytest.raises(ValueError, match="holds no job"):
        write_list(city, ["# nothing"])


def test_no_two_jobs_share_noise(city):
    """Equal seeds of other ids, or other seeds of one id, and 64 bits of both."""
    jobs = [{"id": f"j{i}", "seed": i % 3} for i in range(1000)]
    seeds = {line.noise_seed() for line in write_list(city, jobs)}
    assert len(seeds) == 1000 and max(seeds) >= 2**63
    (a,), (b,) = (write_list(city, [{"id": "a", "seed": s}]) for s in (0, 1))
    assert a.noise_seed() != b.noise_seed()


def test_all_that_can_be_done_is_done_and_the_rest_told(city, painted, tmp_path):
    jobs = [{"id": "a"}, {"id": "b", "path": "no.csv"}, "nonsense", {"id": "c"}]
    jobs += [{"id": "d", "script": "start 1,2 3; forward 30", "path": ""}]
    lines = write_list(city, jobs)
    assert run(tmp_path, lines, painted)
    assert painted.painter.calls == 2 * 3  # 25 frames in clips of nine
    told = status(tmp_path)
    assert (told["jobs"], told["done"], told["waiting"]) == (5, 2, 0)
    assert "no.csv does not exist" in told["failed"]["b"]
    assert "not JSON" in told["failed"]["line-000003"]
    assert "nothing was captured" in told["failed"]["d"]
    ended = [("a", "done"), ("b", "failed"), ("line-000003", "failed")]
    assert logged(tmp_path) == [*ended, ("c", "done"), ("d", "failed")]
    assert not any((tmp_path / "work").iterdir() or (tmp_path / "leases").iterdir())
    assert run(tmp_path, lines, painted) and painted.painter.calls == 6
    assert len(logged(tmp_path)) == 5


def test_a_jobs_bytes_depend_on_the_job_alone(city, painted, tmp_path):
    """Alone, last of a list in another order, and by two workers."""
    jobs = [{"id": "a"}, {"id": "b"}, {"id": "c", "seed": 1}]
    assert run(tmp_path / "all", write_list(city, jobs), painted)
    made = {name: bytes_of(tmp_path / "all", name) for name in "abc"}
    assert len(set(made.values())) == 3
    lines = write_list(city, jobs[::-1])
    other = PaintedModel(painted.config, painted.checkpoint, city)
    assert run(tmp_path / "two", lines, painted, other)
    assert {name: bytes_of(tmp_path / "two", name) for name in "abc"} == made
    assert sorted(logged(tmp_path / "two")) == [(name, "done") for name in "abc"]


def test_a_parked_job_goes_on_behind_its_last_clip(city, painted, tmp_path):
    lines = write_list(city, [{"id": "a"}, {"id": "b"}])
    assert not run(tmp_path, lines, painted, stopped=after(2))
    assert painted.painter.calls == 1
    assert status(tmp_path)["waiting"] == 2 and logged(tmp_path) == [("a", "parked")]
    assert run(tmp_path, lines, painted) and painted.painter.calls == 6
    assert run(tmp_path / "whole", lines, painted)
    for name in "ab":
        assert bytes_of(tmp_path, name) == bytes_of(tmp_path / "whole", name)


def test_work_of_a_line_that_was_changed_is_begun_anew(city, painted, tmp_path):
    lines = write_list(city, [{"id": "a"}])
    assert not run(tmp_path, lines, painted, stopped=after(2))
    assert run(tmp_path, write_list(city, [{"id": "a", "seed": 8}]), painted)
    assert painted.painter.calls == 1 + 3
    lines = write_list(city, [{"id": "a", "seed": 9}])
    assert run(tmp_path, lines, painted) and painted.painter.calls == 4
    assert "another line: seed is 8 there, 9 here" in status(tmp_path)["failed"]["a"]


def test_a_failed_job_is_tried_again_once_its_files_change(city, painted, tmp_path):
    lines = write_list(city, [{"id": "a", "image": "late.png"}])
    assert run(tmp_path, lines, painted) and "a" in status(tmp_path)["failed"]
    late = city.folder.parent / "late.png"
    write_image(late, np.zeros((64, 96, 3), np.uint8))
    assert run(tmp_path, lines, painted) and not status(tmp_path)["failed"]
    late.unlink()


def test_who_lost_a_job_leaves_it_to_its_new_holder(city, painted, tmp_path):
    """A process that was suspended in a clip wakes: another has taken over."""
    lines = write_list(city, [{"id": "a"}])
    folder = JobsFolder(tmp_path, lines, painted.made_by())
    paint = painted.painter.__call__

    def suspended(clip, seed):
        painted.serve = lambda request: paint
        other = JobsFolder(tmp_path, lines, painted.made_by())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leasing, "is_running", lambda pid: False)
            assert run_jobs(other, [painted], lambda: False)
        return paint(clip, seed)

    painted.serve = lambda request: suspended
    assert run_jobs(folder, [painted], lambda: False)
    assert logged(tmp_path) == [("a", "done"), ("a", "lost")]
    assert status(tmp_path)["done"] == 1
    assert not any((tmp_path / "work").iterdir())


def test_numbers_that_are_not_finite_fail_their_job_alone(city, painted, tmp_path):
    def paint(clip, seed):
        if len(made := [*(tmp_path / "videos").iterdir()]) == 1:
            raise FloatingPointError(f"{len(made)} was bad")
        return painted.painter(clip, seed)

    painted.serve = lambda request: paint
    lines = write_list(city, [{"id": name} for name in "abc"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "is_refusal", lambda error: True)  # it is a test's own
        assert run(tmp_path, lines[:2], painted)
    assert "clip 0 of the path" in status(tmp_path)["failed"]["b"]


def test_what_is_wrong_with_the_model_stops_all_and_fails_no_job(
    city, painted, tmp_path
):
    model = Model(painted.config, tmp_path, city)
    with pytest.raises(ValueError, match="holds no model"):
        model.made_by()
    lines = write_list(city, [{"id": "a"}])
    with pytest.raises(ValueError, match="holds no model"):
        run_jobs(JobsFolder(tmp_path, lines, {"weights": "x"}), [model], lambda: False)
    assert status(tmp_path)["waiting"] == 1 and not status(tmp_path)["failed"]
    right = painted.made_by()  # nothing was made: the corrected command may go on

    def damaged(request):
        raise Damaged("block_001 is damaged")

    painted.serve = damaged  # networks are read when the first clip wants them
    with pytest.raises(Damaged):
        run(tmp_path, lines, painted)
    assert status(tmp_path)["waiting"] == 1 and not status(tmp_path)["failed"]
    painted.serve = lambda request: painted.painter
    assert not run(tmp_path, lines, painted, stopped=after(2))
    with pytest.raises(ValueError, match="weights is 'painter' there, 'y' here"):
        JobsFolder(tmp_path, lines, right | {"weights": "y"})


def test_a_list_is_checked_without_weights(city, painted):
    jobs = [{"id": "a"}, {"id": "b", "sample": {"num_steps": 10}}]
    jobs += [{"id": "fast", "speed_m_s": 40}, {"id": "no", "image": "no.png"}, "[]"]
    model = dataclasses.replace(painted, checkpoint=city.folder / "nothing")
    checked, size_bytes = check_jobs(write_list(city, jobs), model)
    told = summarise(checked, size_bytes, seconds_per_step=6.0, devices=4)
    assert (told["jobs"], told["good"], told["clips"]) == (5, 3, 3 + 3 + 1)
    assert told["steps"] == 4 * (3 + 1) + 10 * 3
    assert told["device_hours"] == round(told["steps"] * 6 * 4 / 3600, 2)
    assert told["each"]["a"] == {
        "frames": 25,
        "clips": 3,
        "grounded": 1.0,
        "distance_m": pytest.approx(0.5, abs=0.1),
    }
    assert 0 < told["gigabytes"] * 1e9 < 54 * 2 * 32 * 48 * 3
    assert list(told["bad"]) == ["no", "line-000005"]
    said = describe_check(checked, told)
    assert "3 of 5 jobs can be done" in said and "line     4  no" in said
    assert "no.png does not exist" in said and "Try --speed-m-s=" in said


def test_records_that_are_damaged_count_for_nothing(tmp_path):
    (tmp_path / "x.json").write_text("[")
    assert read_record(tmp_path / "x.json") == read_record(tmp_path / "y.json") == {}


def test_the_door_checks_a_list_and_ends_with_3(city, tmp_path, capsys):
    """Neither a checkpoint nor an accelerator is asked for."""
    write_list(city, [{"id": "a"}, {"id": "no", "image": "no.png"}])
    config = f"{training_city.ROOT}/configs/toy_city.py:test"
    words = [f"--config={config}", f"--city={city.folder}", f"--out={tmp_path}"]
    words += [f"--jobs={city.folder.parent}/jobs.jsonl", "--check", "--seed=3"]
    assert door.main(door.COMMAND.parse(words)) == 3
    assert "1 of 2 jobs can be done" in capsys.readouterr().out
    assert json.loads((tmp_path / "check.json").read_text())["jobs"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image=x", "--path=y"], "--checkpoint must be given"),
        (["--checkpoint=c", "--path=y"], "An image is needed"),
        (["--checkpoint=c", "--image=x"], "a path or a script"),
        (["--checkpoint=c", "--image=x", "--jobs=j"], "--image: of one video"),
        (["--image=x", "--path=y", "--check"], "--check: of a list of videos"),
        (["--jobs=j", "--independent", "--distributed"], "alone or joined, not both"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message):
    needed = [f"--config={training_city.ROOT}/configs/toy_city.py:test"]
    given = door.COMMAND.parse([*needed, "--city=c", "--out=o", *words])
    with pytest.raises(ValueError, match=message):
        door.main(given)
