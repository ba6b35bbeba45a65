"""Encode a prompt with the text encoder of Wan 2.1, on a machine of any size.

    python tools/encode_prompt.py --source=DIR --prompt=TEXT [--out=text.npy]

DIR is a checkpoint as published, in the official layout or in diffusers'. One block's
weights are in memory at a time: 1.4 GiB. The rows are written as float32, for
`python -m cityrag_jax.generate --text=text.npy`.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

from cityrag_jax.convert.prompt import encode_prompts


def main() -> None:
    """Parse, encode and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--prompt", required=True, help="may be empty")
    parser.add_argument("--out", type=Path, default=Path("text.npy"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    try:
        if not options.out.absolute().parent.is_dir():
            raise ValueError(f"There is no folder for {options.out}; make it first.")
        (rows,) = encode_prompts(
            options.source, [options.prompt], dtype=np.dtype(options.dtype)
        )
        write_rows(options.out, rows)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{options.out}: {rows.shape[0]} rows of width {rows.shape[1]}, float32")


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
    main()
