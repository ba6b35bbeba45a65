"""Encode a prompt with the text encoder of Wan 2.1, on a machine of any size.

    python tools/encode_prompt.py --source=DIR --prompt=TEXT [--out=text.npy]

DIR is a checkpoint as published, in the official layout or in diffusers'. One block's
weights are in memory at a time: 1.4 GiB. The rows are written as float32, for
`python -m cityrag_jax.generate --text=text.npy`.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from cityrag_jax.commands import Command
from cityrag_jax.convert.prompt import encode_prompts

COMMAND = Command(__doc__)
COMMAND.needs("--source", type=Path, help="checkpoint folder")
COMMAND.needs("--prompt", help="may be empty")
COMMAND.makes(
    "--out", needed=False, type=Path, default=Path("text.npy"), help="file to write"
)
COMMAND.takes(
    "--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in"
)


def main(given: argparse.Namespace) -> None:
    """Encode and write."""
    if not given.out.absolute().parent.is_dir():
        raise ValueError(f"There is no folder for {given.out}; make it first.")
    (rows,) = encode_prompts(given.source, [given.prompt], dtype=np.dtype(given.dtype))
    write_rows(given.out, rows)
    print(f"{given.out}: {rows.shape[0]} rows of width {rows.shape[1]}, float32")


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Write under another name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    COMMAND.run(main)
