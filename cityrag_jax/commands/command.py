"""A command line: options, help, and how a command ends.

    COMMAND = Command(__doc__)
    COMMAND.needs_config()
    COMMAND.needs("--checkpoint", help="model folder or training workdir")
    COMMAND.takes("--seed", type=int, default=0, help="of the noise")

    if __name__ == "__main__":
        COMMAND.run(main)  # main(given): given.config, given.checkpoint, given.seed

Options have hyphens, underscores are taken for them; stray words are refused. A command
ends with

    0   all is done
    1   training went astray (FloatingPointError)
    2   something given is wrong: one line says what, where and what to do
    3   some of many things cannot be done, the others are
    75  of several processes that work together another is lost
    70  a fault of this program: one line says where; --debug shows the traceback
    130 stopped by hand
"""

import argparse
import contextlib
import dis
import errno
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cityrag_jax.commands.config_files import (
    BOOLEANS,
    change_config,
    describe_keys,
    load_config,
    nearest,
)
from cityrag_jax.files import made_for_use
from cityrag_jax.parallel import is_peer_lost

PACKAGE = str(Path(__file__).parents[1])
ROOT = str(Path(__file__).parents[2])
BAD_INPUT, FAULT, PEER_LOST, STOPPED = 2, 70, 75, 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what no room on a disk is called
CONFIG_HELP = (
    "Python file with get_config(variant), such as configs/toy_city.py[:variant]; "
    "--config.section.key=VALUE changes a value, --config=FILE --help lists all"
)


class Command:
    """A command's options, read by `parse`, and its end, by `run`."""

    def __init__(self, doc: str):
        """Describe a command by its module's docstring, which holds an example."""
        self._parser = _Parser(
            prog=_how_called(),
            description=textwrap.dedent(doc).strip(),
            usage="%(prog)s --option=VALUE ...",
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        self._needed = self._parser.add_argument_group("needed")
        self._optional = self._parser.add_argument_group("options")
        self._has_config = False
        self._made: list[str] = []

    def needs_config(self) -> None:
        """Add --config and --config.section.key; `given.config` is a ConfigDict."""
        self._has_config = True
        self.needs("--config", metavar="FILE[:VARIANT]", help=CONFIG_HELP)

    def takes_config(self) -> None:
        """Add them where the command can do without; `given.config` may be None."""
        self._has_config = True
        self.takes("--config", metavar="FILE[:VARIANT]", help=CONFIG_HELP)

    def needs(self, name: str, **kinds: Any) -> None:
        """Add an option that must be given; `kinds` are argparse's."""
        self._needed.add_argument(name, required=True, **kinds)

    def takes(self, name: str, **kinds: Any) -> None:
        """Add an option; its default is shown if it is one to look at."""
        default = kinds.get("default")
        if default not in (None, "", [], ()):
            kinds["help"] = f"{kinds['help']} (default: {_listed(default)})"
        self._optional.add_argument(name, **kinds)

    def makes(self, name: str, *, needed: bool = True, **kinds: Any) -> None:
        """Add an option that names what to write: made for nothing, it goes again."""
        (self.needs if needed else self.takes)(name, **kinds)
        self._made.append(name.strip("-").replace("-", "_"))

    def switch(self, name: str, help: str) -> None:
        """Add an option that is on when it is named; =false turns it off."""
        self._optional.add_argument(
            name,
            nargs="?",
            const=True,
            default=False,
            type=_read_switch,
            metavar="false",
            help=help,
        )

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Read a command line; print help, or what is wrong with it, and exit."""
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        self._finish()
        words, changes = arguments, []
        if self._has_config:
            words, changes = _take_changes(arguments)
        words = [_with_hyphens(word) for word in words]
        if {"--help", "-h", "--help-config"} & set(words):
            with contextlib.suppress(BrokenPipeError):  # of `--help | head`
                print(self._help(words, changes), flush=True)
            sys.exit(0)
        self._refuse_empty(words)
        given = self._parser.parse_args(words)
        if self._has_config and (given.config or changes):
            try:
                given.config_file = given.config
                given.config = _changed(given.config, changes)
            except ValueError as error:
                self._parser.error(str(error))
        return given

    def run(self, main: Callable[[argparse.Namespace], int | None]) -> NoReturn:
        """Parse the command line, call, and exit as a good host does."""
        sys.exit(self.call(main))

    def call(
        self,
        main: Callable[[argparse.Namespace], int | None],
        arguments: Sequence[str] | None = None,
    ) -> int:
        """Parse, call, and give the exit code; say in a line what went wrong."""
        given = self.parse(arguments)
        if given.debug:
            return self._make(main, given)
        try:
            return self._make(main, given)
        except KeyboardInterrupt:
            return _say("stopped.", STOPPED)
        except Exception as error:
            code = _say(*describe_error(error))
            if code == PEER_LOST:  # JAX would wait for the other, and abort without it
                os._exit(code)
            return code

    def _make(self, main, given: argparse.Namespace) -> int:
        """Call, and leave no empty folder where nothing came of it."""
        with contextlib.ExitStack() as made:
            for path in filter(None, (getattr(given, name) for name in self._made)):
                made.enter_context(made_for_use(path))
            return main(given) or 0

    def _refuse_empty(self, words: list[str]) -> None:
        """Refuse `--out=`, as of a shell's empty variable: it is the working folder."""
        needed = {
            s for action in self._needed._group_actions for s in action.option_strings
        }
        needed |= {f"--{name.replace('_', '-')}" for name in (*self._made, "config")}
        for word, after in zip(words, [*words, "x"][1:], strict=True):
            name, equals, value = word.partition("=")
            if name in needed and not (value if equals else after):
                self._parser.error(f"{name} is empty")

    def _finish(self) -> None:
        """Add, once and last, what every command takes."""
        if "--help" not in self._parser._option_string_actions:
            self.switch("--debug", "show the traceback of an error")
            self._optional.add_argument("--help", "-h", action="store_true", help=HELP)

    def _help(self, words: list[str], changes: list[tuple[str, str]]) -> str:
        alone = "--help-config" in words
        spec = _value_of("--config", words) if self._has_config else None
        if spec is None:
            if alone:
                self._parser.error("--help-config needs --config=FILE[:VARIANT]")
            return self._parser.format_help()
        try:
            keys = f"keys of {spec}:\n{describe_keys(_changed(spec, changes))}"
        except ValueError as error:
            self._parser.error(str(error))
        return keys if alone else f"{self._parser.format_help()}\n{keys}"


HELP = "this text; with --config=FILE the keys of that file, too (--help-config: alone)"


def is_refusal(error: BaseException) -> bool:
    """Say whether an error is an answer to what was given, not a fault.

    A ValueError is, if a `raise` of this package made it: what libraries or the
    interpreter raise while we compute is a bug of ours. An OSError speaks of files.
    """
    if isinstance(error, OSError):
        return error.errno is not None
    if not isinstance(error, ValueError | FloatingPointError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    ours = code.co_filename.startswith(PACKAGE) or _is_tool(code.co_filename)
    return ours and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def describe_error(error: Exception) -> tuple[str, int]:
    """Give the line that a person reads, and the exit code."""
    if is_peer_lost(error):
        reason = " ".join(str(error).split())[-60:]
        return (
            f"error: another of the joined processes is lost (... {reason}). Look at "
            "what it said last, end what is left of it, and repeat the command."
        ), PEER_LOST
    if not is_refusal(error):
        place = _last_place(error)
        text = " ".join(str(error).split())[:300]
        return (
            f"internal error: {type(error).__name__}: {text} ({place}). This is a "
            "fault of this program; repeat the command with --debug and report it."
        ), FAULT
    if isinstance(error, OSError):
        cure = " Make room, then repeat the command." if error.errno in FULL else ""
        place = error.filename or _last_place(error)
        return f"error: {place}: {error.strerror}.{cure}", BAD_INPUT
    code = 1 if isinstance(error, FloatingPointError) else BAD_INPUT
    return f"error: {error}", code


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as our docstrings."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=88)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, with the options that look like it."""

    def parse_args(self, words):
        given, extra = self.parse_known_args(words)
        if extra:
            word = extra[0].partition("=")[0]
            known = [s for action in self._actions for s in action.option_strings]
            near = nearest(word, known)
            kind = "is no option" if word.startswith("-") else "is a stray word"
            hint = f"; is {' or '.join(near)} meant?" if near else ""
            self.error(f"{extra[0]} {kind} of this command{hint}")
        return given

    def error(self, message: str) -> NoReturn:
        text = message.rstrip(".").replace("the following arguments are required:", "")
        if text != message.rstrip("."):
            text = f"{text.strip()} must be given"
        sys.exit(_say(f"error: {text} ({self.prog} --help).", BAD_INPUT))


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return code


def _changed(spec, changes):
    if not spec:
        raise ValueError(f"--config.{changes[0][0]} needs --config=FILE[:VARIANT]")
    config = load_config(spec)
    change_config(config, changes)
    return config


def _take_changes(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Part the `--config.key=value` from the other words; a bare key means true."""
    others, changes = [], []
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            others.append(word)
            continue
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        changes.append((key, text))
    return others, changes


def _with_hyphens(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _value_of(name: str, words: list[str]) -> str | None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and after and not after.startswith("-"):
            return after
    return None


def _read_switch(text: str) -> bool:
    try:
        return BOOLEANS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false") from None


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _is_tool(file: str) -> bool:
    return file.startswith(f"{ROOT}/tools/") or file.startswith("tools/")


def _last_place(error: BaseException) -> str:
    """Give file and line where our own code was when an error came."""
    place, trace = "unknown place", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(PACKAGE):
            place = f"{file.removeprefix(PACKAGE)[1:]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _how_called() -> str:
    """Give the command's name as a person types it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"
