"""Command lines: one style of options, help that helps, one line for what is wrong."""

import argparse
import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from cityrag_jax import sampling
from cityrag_jax.commands import Command, change_config, load_config
from cityrag_jax.commands.config_files import flatten, unused_meanings
from cityrag_jax.files import open_folder

ROOT = pathlib.Path(__file__).parents[1]
TOY = str(ROOT / "configs" / "toy_city.py")
DOORS = ("demo", "doctor", "train", "generate", "evaluate", "survey")
# Nothing is needed, or either this or that.
OPTIONAL = ("benchmark", "build_city", "count_parameters", "demo", "doctor")
OPTIONAL += ("store_int8",)
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def command_of(name: str) -> Command:
    if name in DOORS:
        return importlib.import_module(f"cityrag_jax.{name}").COMMAND
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.COMMAND


@pytest.fixture
def command():
    made = Command("Make something:\n\n    python -m make --out=DIR")
    made.needs_config()
    made.makes("--out", help="folder to write to")
    made.takes("--max-size", type=int, default=3, help="of it")
    made.switch("--fast", "not slow")
    return made


def refused(command, capsys, *words) -> str:
    """Parse what cannot be; give the one line that says so."""
    with pytest.raises(SystemExit) as ended:
        command.parse(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    return said.err


def test_options_are_read_in_either_spelling(command):
    words = [f"--config={TOY}:test", "--out", "x", "--max_size=4", "--fast"]
    words += ["--config.train.steps", "7", "--config.train.tensorboard"]
    given = command.parse(words)
    assert (given.out, given.max_size, given.fast) == ("x", 4, True)
    assert given.config.train.steps == 7 and given.config.train.tensorboard
    assert given.config.is_locked
    given = command.parse([f"--config={TOY}", "--out=y", "--fast=false"])
    assert (given.max_size, given.fast) == (3, False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([f"--config={TOY}"], "--out must be given"),
        ([f"--config={TOY}", "--out=x", "y"], "y is a stray word"),
        ([f"--config={TOY}", "--out="], "--out is empty"),
        ([f"--config={TOY}", "--out", ""], "--out is empty"),
        (["--config=", "--out=x"], "--config is empty"),
        ([f"--config={TOY}", "--out=x", "--max-syze=1"], "is --max-size meant?"),
        ([f"--config={TOY}", "--out=x", "--max-size=a"], "invalid int value: 'a'"),
        ([f"--config={TOY}", "--out=x", "--fast=perhaps"], "not true or false"),
        (["--config=configs/toy_cyti.py", "--out=x"], "configs/toy_city.py"),
        ([f"--config={TOY}:tset", "--out=x"], "gpu, demo and test, not 'tset'"),
        (["--config=/proc/version", "--out=x"], "cannot be read as a config"),
    ],
)
def test_a_command_line_that_is_wrong_is_refused_in_one_line(
    words, told, command, capsys
):
    assert told in refused(command, capsys, *words)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("sample.steps=4", "is train.steps or sample.num_steps"),
        ("sample.num_step=4", "sample.num_steps"),
        ("train=4", "is a section"),
        ("train.steps=many", "is no int"),
        ("train.steps=2.5", "is no int"),
        ("train.tensorboard=perhaps", "is no true or false"),
        ("optimizer.learning_rate=fast", "is no float"),
        ("data.condition_frames=(1,'a')", "is no tuple"),
    ],
)
def test_a_change_that_cannot_be_names_the_key_and_what_is_near(
    change, told, command, capsys
):
    words = [f"--config={TOY}", "--out=x", f"--config.{change}"]
    line = refused(command, capsys, *words)
    assert told in line and f"--config.{change.partition('=')[0]}" in line


def test_values_take_the_types_of_the_file():
    config = load_config(f"{TOY}:test")
    changes = {
        "train.steps": ("10_000", 10_000),
        "train.ema_decay": ("0", 0.0),
        "data.yaw_rate_deg": ("(0, 3)", (0.0, 3.0)),
        "optimizer.frozen": ("('blocks.*',)", ("blocks.*",)),
        "eval.noise_levels": ("0.25", (0.25,)),
        "model.text": ("from_checkpoint", "from_checkpoint"),
        "train.mesh.fsdp": ("-1", -1),
    }
    change_config(config, [(key, text) for key, (text, _) in changes.items()])
    values = flatten(config)
    for key, (_, value) in changes.items():
        assert values[key] == value and type(values[key]) is type(value), key


def test_every_key_of_every_config_has_a_meaning_and_no_other_has():
    files = sorted((ROOT / "configs").glob("*.py"))
    found = unused_meanings(load_config(str(file)) for file in files)
    assert found == {"missing": set(), "unused": set()}


@pytest.mark.parametrize("name", (*DOORS, *TOOLS))
def test_help_says_what_is_needed_gives_an_example_and_exits_0(
    name, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT / "tools")  # as Python does for a script
    command = command_of(name)
    with pytest.raises(SystemExit) as ended:
        command.parse(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"{name}" in text and "options:" in text and "--debug" in text
    assert "needed:" in text or name in OPTIONAL
    assert max(map(len, text.splitlines())) <= 88


def test_help_with_a_config_lists_its_keys_with_values_and_meaning(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse([f"--config={TOY}", "--help", "--config.train.steps=12"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--config.train.steps=12 " in text and "updates in all" in text
    assert "folder to write to" in text
    with pytest.raises(SystemExit):
        command.parse([f"--config={TOY}", "--help-config"])
    assert "folder to write to" not in capsys.readouterr().out


# How a command ends -------------------------------------------------------------------


def end_of(command, main, capsys, *words):
    code = command.call(main, [f"--config={TOY}", "--out=x", *words])
    said = capsys.readouterr().err
    assert said.count("\n") <= 1 and "Traceback" not in said
    return code, said


def test_what_our_code_refuses_ends_with_2_and_one_line(command, capsys, tmp_path):
    def refuse(given: argparse.Namespace):
        sampling.Sampler(without=("weather",))

    code, said = end_of(command, refuse, capsys)
    assert code == 2 and said.startswith("error: ") and "weather" in said

    def miss(given):
        (tmp_path / "none").read_text()

    code, said = end_of(command, miss, capsys)
    assert code == 2 and f"{tmp_path}/none: No such file" in said


@pytest.mark.parametrize("name", (*DOORS, *TOOLS))
def test_what_a_command_writes_to_is_not_left_empty(name, monkeypatch, tmp_path):
    """Whatever is refused behind the opened folder: it and those above it go."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    command = command_of(name)
    options = command._parser._option_string_actions
    named = [word for word in ("out", "workdir") if f"--{word}" in options]
    given = argparse.Namespace(debug=False, **{a: tmp_path / "x" / a for a in named})

    def refuse(given):
        for path in map(given.__getattribute__, named):
            open_folder(path)
        sampling.Sampler(without=("weather",))

    monkeypatch.setattr(command, "parse", lambda _: given)
    assert command.call(refuse) == 2
    assert not list(tmp_path.iterdir())


def test_a_fault_inside_sampling_is_an_internal_error_not_bad_input(
    command, capsys, monkeypatch
):
    """A catch-all for ValueError would hide every bug that libraries find."""

    def planted(*_, **__):
        np.zeros(3).reshape(2, 2)

    monkeypatch.setattr(sampling, "passes", planted)
    for main in (lambda given: sampling.Sampler().passes(), lambda given: 1 / 0):
        code, said = end_of(command, main, capsys)
        assert code == 70 and said.startswith("internal error: ")
    with pytest.raises(ValueError, match="reshape"):
        command.call(
            lambda given: sampling.Sampler().passes(),
            [f"--config={TOY}", "--out=x", "--debug"],
        )


def test_other_ends(command, capsys):
    assert end_of(command, lambda given: None, capsys) == (0, "")
    assert end_of(command, lambda given: 3, capsys)[0] == 3

    def stopped(given):
        raise KeyboardInterrupt

    assert end_of(command, stopped, capsys) == (130, "stopped.\n")


def test_a_door_says_one_line_and_exits_2(tmp_path):
    """The real thing: no traceback, nothing on stdout, no folder left."""
    words = [f"--config={TOY}", "--config.sample.nope=1", "--checkpoint=x", "--city=y"]
    words += ["--image=z", "--path=p", f"--out={tmp_path / 'out'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", "cityrag_jax.generate", *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.count("\n") == 1 and "sample.nope" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_every_message_of_the_page_is_said_somewhere():
    """The words between what differs stand in the code, so the page stays true."""
    page = (ROOT / "cityrag_jax" / "commands" / "README.md").read_text()
    files = [*(ROOT / "cityrag_jax").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    # Strings broken over lines are joined, and what is filled in is left out.
    code = " ".join(path.read_text() for path in files)
    code = re.sub(r'"\s+f?"', "", code)
    said = re.sub(r"\{[^{}]*\}", "*", code)
    rows = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(rows) > 12
    for message in rows:
        for words in re.split(r"\b(?:NAME|N|M)\b", message):
            assert words.strip(" :") in said, message
