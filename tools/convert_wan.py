"""Convert published Wan 2.1 weights to a CityRAG checkpoint.

    python tools/convert_wan.py --source=DIR --out=DIR [--dtype=bfloat16|float32|int8]
        [--parts=transformer,vae,clip,text] [--prompt=TEXT] [--lora=FILE[:STRENGTH]]
        [--dry-run] [--check]

DIR is a folder as fetched, image-to-video or text-to-video, in the official layout or
in diffusers'. It is read tensor by tensor: less than 4 GiB of memory for any size.
Interrupted and started again with the same command, it goes on; finished, it says so.
int8 stores kernels so,
with a float32 scale for each of their output channels, and asks to be read as bfloat16.
--lora, as often as there are files, merges LoRA files of Wan (kohya's, diffusers' or
PEFT's names) into the transformer; geo attention begins as a copy of the merged one.
--dry-run checks names, shapes and types by the headers and prints the plan. --check
compares every digest of what was written, or of --out if that exists. Nothing
half-written has the name of the output.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from cityrag_jax.checkpoint import hush_writers, load_bundle, verify_bundle
from cityrag_jax.checkpoint.memory import give_back_at_once
from cityrag_jax.commands import Command
from cityrag_jax.convert.bundle import (
    PARTS,
    PROMPT,
    Row,
    convert,
    is_done,
    plan_conversion,
    table,
)

COMMAND = Command(__doc__)
COMMAND.takes("--source", type=Path, help="folder of published weights")
COMMAND.makes("--out", type=Path, help="folder to make")
COMMAND.takes(
    "--dtype",
    choices=("bfloat16", "float32", "int8"),
    default="bfloat16",
    help="of what is written",
)
COMMAND.takes("--parts", help=f"some of {','.join(PARTS)}; all without it")
COMMAND.takes("--prompt", default=PROMPT, help="instead of the paper's")
COMMAND.takes(
    "--lora",
    action="append",
    default=[],
    metavar="FILE[:STRENGTH]",
    help="to merge into the transformer; may be repeated",
)
COMMAND.switch("--dry-run", "check names, shapes and types, and print the plan")
COMMAND.switch("--check", "compare every digest of what was written, or is there")


def main(given: argparse.Namespace) -> None:
    """Convert, or check."""
    hush_writers()
    if given.check and given.out.exists() and not _same(given.source, given.out):
        verify_bundle(given.out)
        print(f"{given.out} is whole: every digest fits.")
        return
    if given.source is None:
        raise ValueError("Give --source, the folder of the published weights.")
    plan = plan_conversion(
        given.source,
        given.out,
        dtype=given.dtype,
        parts=given.parts.split(",") if given.parts else None,
        prompt=given.prompt,
        loras=given.lora,
    )
    print(f"{plan.folder.path}: Wan 2.1, {plan.folder.layout} layout, to {plan.dtype}")
    if given.dry_run:
        print_table(table(plan))
        print("Names, shapes and types fit. Nothing was written.")
        return
    if is_done(plan):
        print(f"{given.out} is there already, made of just this; nothing is to do.")
        return
    print_table(convert(plan))
    for name, rows in prompts(given.out).items():
        print(f"{name}: {rows.shape[0]} rows of {rows.shape[1]}")
    print(f"{given.out}: done.")
    if given.check:
        verify_bundle(given.out)
        print("Every digest fits.")


def _same(source: Path | None, out: Path) -> bool:
    return source is not None and source.resolve() == out.resolve()


def prompts(out: Path) -> dict[str, np.ndarray]:
    """Read the prompts' rows that a bundle holds."""
    bundle = load_bundle(out)
    found = {"prompt": bundle.text, "empty prompt": bundle.negative_text}
    return {name: rows for name, rows in found.items() if rows is not None}


def print_table(rows: Sequence[Row]) -> None:
    """Print what was read of each part beside what it should have been."""
    print(
        f"{'part':<12}{'tensors':>8}{'parameters':>17}{'expected':>17}"
        f"{'bytes':>17}{'checksum':>10}"
    )
    for row in rows:
        print(
            f"{row.part:<12}{row.tensors:>8}{row.parameters:>17,}{row.expected:>17,}"
            f"{row.num_bytes:>17,}{row.checksum:>10}"
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    give_back_at_once()
    COMMAND.run(main)
