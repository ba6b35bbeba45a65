"""A wheel brings all that the demo needs, to a machine without the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BROUGHT = ("cityrag_jax", "configs", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "-q", "--no-input", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index"]


def test_every_folder_of_the_package_is_in_the_wheel():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent for path in (ROOT / "cityrag_jax").rglob("__init__.py")]
    found = {".".join(path.relative_to(ROOT).parts) for path in folders}
    assert set(told["packages"]) == found | {"cityrag_jax.configs"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
    """Build a wheel of a copy and unpack it as pip does, without any network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BROUGHT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    build = ["wheel", *OFFLINE, "--no-build-isolation", "-w", "made", "."]
    subprocess.run([*PIP, *build], cwd=folder, check=True)
    (wheel,) = (folder / "made").glob("*.whl")
    unpack = ["install", *OFFLINE, "--target", "site", wheel]
    subprocess.run([*PIP, *unpack], cwd=folder, check=True)
    return folder / "site"


def run(installed, folder, *words) -> str:
    """Run a door of the wheel in a folder; give what it printed."""
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = ""  # one device, and programs that are optimised
    ended = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


@pytest.mark.long
def test_the_wheel_goes_the_whole_road_in_an_empty_folder(installed, tmp_path):
    """The shipped config by the name that the README uses, the shipped weights."""
    listed = run(installed, tmp_path, "cityrag_jax")
    assert "cityrag_jax.demo" in listed and "tools/" not in listed
    said = run(installed, tmp_path, "cityrag_jax.demo", "--train-seconds=0")
    assert "Done. Look at:" in said
    out = tmp_path / "out" / "demo"
    for name in ("made/video.mp4", "made/generate.json", "side_by_side.png"):
        assert (out / name).stat().st_size > 500
    rows = (out / "table.md").read_text().splitlines()
    figures = [float(row.split("|")[2].strip(" *")) for row in rows[2:]]
    assert figures[0] == max(figures), "with both conditions it is best"
    help_text = run(
        installed,
        tmp_path,
        "cityrag_jax.train",
        "--config=configs/toy_city.py:demo",
        "--help",
    )
    assert "--config.train.max_seconds=120.0" in help_text
