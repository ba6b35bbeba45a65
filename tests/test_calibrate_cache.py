"""The ratios that are printed are a key that the doors take."""

import subprocess
import sys

import pytest
import training_city
from test_generator import DIT, bundle_of_no_zeros

from cityrag_jax.checkpoint import save_bundle
from cityrag_jax.sampling import read_sampler


@pytest.mark.long
def test_printed_ratios_make_a_schedule(tmp_path):
    training_city.build_city(tmp_path / "city")
    save_bundle(tmp_path / "model", bundle_of_no_zeros())
    given = dict(
        config=f"{training_city.ROOT}/configs/toy_city.py:test",
        checkpoint=tmp_path / "model",
        city=tmp_path / "city",
        clips=1,
    )
    ended = subprocess.run(
        [sys.executable, "tools/calibrate_cache.py", "--config.sample.num_steps=10"]
        + ["--config.eval.min_rotation_deg=0"]
        + [f"--config.model.transformer.dim={DIT.dim}"]
        + [f"--config.model.transformer.patch={DIT.patch}"]
        + [f"--{name}={value}" for name, value in given.items()],
        cwd=training_city.ROOT,
        env=training_city.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    key, *lines = ended.stdout.splitlines()
    ratios = key.removeprefix('--config.sample.ratios="(').removesuffix(')"').split(",")
    assert len(ratios) == 10 and float(ratios[0]) == 1
    config = training_city.get_config(
        "toy_city", sample__num_steps=10, sample__preset="draft"
    )
    with config.unlocked():
        config.sample.ratios = tuple(map(float, ratios))
    compute = read_sampler(config.sample).compute
    assert f"draft: {sum(compute)} of 10 steps" in ended.stdout
    assert len(lines) == 4
