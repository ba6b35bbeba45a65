"""What a disk says through Orbax and TensorStore, once and in a few words.

Where a write fails, every thread that took part prints a traceback of its own, some of
them after the event loop that they report to is closed. The error itself is raised, too
and that is what our commands say.
"""

import contextlib
import logging as standard_logging
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import logging

# What a system says of a disk, and what to do.
CAUSES = {
    "No space left on device": "Free some space",
    "Disk quota exceeded": "Free some space",
    "File too large": "Raise the limit of a file's size (ulimit -f)",
    "No such file or directory": "The folder is gone: look who removed it",
    "Permission denied": "Look at the rights of the folder",
    "Read-only file system": "Look at the disk",
    "Input/output error": "Look at the disk",
    "Stale file handle": "Look at the disk",
}


def find_cause(error: Exception) -> str:
    """Give the words of the system within a library's error; empty if none are."""
    told = str(error)
    return next((words for words in CAUSES if words in told), "")


def describe_cause(error: Exception) -> str:
    """Say in a few words why a write failed."""
    told = " ".join(str(error).split())[:200]
    return find_cause(error) or told or type(error).__name__


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say by a ValueError which folder could not be written, where a disk is why."""
    try:
        yield
    except Exception as error:  # tensorstore and Orbax raise many kinds
        cause = find_cause(error)
        if not cause:
            raise
        raise ValueError(
            f"{folder} could not be written ({cause}). {CAUSES[cause]}, then repeat "
            "the command."
        ) from error


def hush_writers() -> None:
    """Let the threads of a write say nothing: for commands that say what it raised."""
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    sys.unraisablehook = hush_late_writes


def hush_late_writes(unraisable) -> None:
    """Be an unraisablehook that leaves out what reports to a closed event loop."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
