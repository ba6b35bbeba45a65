"""The list of doors, and what a machine is told about itself."""

import argparse
import re
import subprocess
import sys

import pytest

from cityrag_jax import __main__, doctor

GIVEN = argparse.Namespace()


def test_every_door_is_listed_with_what_it_does(capsys):
    assert __main__.main(["--help"]) == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^  python -m cityrag_jax\.(\w+) +\S", text, re.MULTILINE)
    assert listed == [
        n for n in __main__.DOORS if (__main__.PACKAGE / f"{n}.py").exists()
    ]
    assert "python tools/convert_wan.py" in text
    for file in __main__.PACKAGE.glob("*.py"):
        if "COMMAND.run(main)" in file.read_text() and file.stem != "__main__":
            assert file.stem in listed, "a door that nobody is told of"


def test_a_word_that_is_no_door_is_answered_by_the_nearest():
    command = [sys.executable, "-m", "cityrag_jax", "trian"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "cityrag_jax.train." in ended.stderr


def test_the_doctor_finds_what_is_missing_and_what_is_broken(
    capsys, monkeypatch, tmp_path
):
    (tmp_path / "half_installed.py").write_text("raise OSError('no libcudart.so.13')")
    monkeypatch.syspath_prepend(tmp_path)
    extras = [
        doctor.Extra("json", "reads JSON", "json"),
        doctor.Extra("no_such_package", "nothing", "cityrag-jax[nothing]"),
        doctor.Extra("half_installed", "nothing", "other"),
    ]
    monkeypatch.setattr(doctor, "EXTRAS", extras)
    assert doctor.COMMAND.call(doctor.main, []) == 0
    text = capsys.readouterr().out
    assert re.search(r"json +reads JSON +works", text)
    assert "pip install 'cityrag-jax[nothing]'" in text
    assert "BROKEN (no libcudart.so.13); pip install 'other'" in text
    assert "8 x cpu" in text and "All that is needed works." in text
    for size in ("18,285,216", "1,726,901,312", "20,696,774,976"):  # as the README has
        assert size in text


def test_a_machine_that_cannot_compute_is_told_so(capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no device\nand much more")

    monkeypatch.setattr(doctor, "EXTRAS", ())
    monkeypatch.setattr(doctor.jax, "devices", fail)
    assert doctor.main(GIVEN) == 1
    text = capsys.readouterr().out
    assert "BROKEN: RuntimeError: no device\n" in text and "devices: broken." in text


@pytest.mark.parametrize(
    ("needed", "devices", "told"),
    [(3, 1, "3.0 GiB: fits"), (9, 4, "2.2 GiB: fits"), (9, 2, "9.0 GiB: 3 devices")],
)
def test_what_does_not_fit_says_how_many_devices_hold_it(needed, devices, told):
    assert doctor._verdict(needed * doctor.GIB, 4 * doctor.GIB, devices) == told
