"""Export the transformer of a checkpoint as safetensors that PyTorch opens.

    python tools/export_wan.py --checkpoint=DIR --out=DIR --naming=official|diffusers

--checkpoint is a converted folder or a training workdir (its averaged weights if there
are any). The branches go along under the names that cityrag_jax/convert/README.md
lists; --base-only leaves Wan alone, which diffusers loads without a remark. Adapters
(LoRA) are merged; --lora writes them alone, as one .safetensors that diffusers and
others load.
"""

import argparse
from pathlib import Path

import jax

from cityrag_jax.commands import Command
from cityrag_jax.convert.export import Part, export_checkpoint, export_lora
from cityrag_jax.convert.names import NAMINGS

COMMAND = Command(__doc__)
COMMAND.needs("--checkpoint", type=Path, help="converted folder or training workdir")
COMMAND.makes("--out", type=Path, help="new or empty folder; of --lora a file")
COMMAND.needs("--naming", choices=NAMINGS, help="of the tensors")
COMMAND.switch("--base-only", "Wan without branches")
COMMAND.switch("--lora", "the adapters alone")
COMMAND.takes("--max-shard-gb", type=float, default=5.0, help="10^9 bytes of a file")
COMMAND.takes(
    "--dtype",
    choices=("bfloat16", "float32"),
    help="without it as it is, of an int8 folder float32",
)

CLASSES = {
    "official": "wan.modules.model.WanModel",
    "diffusers": "diffusers.WanTransformer3DModel",
}


def print_table(parts: list[Part], out: Path, naming: str) -> None:
    """Print what was written and how to open it."""
    total = Part("all", *map(sum, zip(*(_counts(part) for part in parts), strict=True)))
    print(f"{'':<18}{'tensors':>9}{'parameters':>18}{'bytes':>18}")
    for part in (*parts, total):
        count, parameters, size = _counts(part)
        print(f"{part.name:<18}{count:>9,}{parameters:>18,}{size:>18,}")
    print(f'Open with {CLASSES[naming]}.from_pretrained("{out}").')
    if len(parts) > 1:
        print(
            "It passes over the branches, geo.* and pose.*: open_export of "
            "cityrag_jax/convert/torch_cityrag.py takes them too (diffusers' names)."
        )


def _counts(part):
    return part.tensors, part.parameters, part.num_bytes


def main(given: argparse.Namespace) -> None:
    """Export, and say what was written."""
    if not given.max_shard_gb > 0:
        raise ValueError(f"--max-shard-gb={given.max_shard_gb} must be above 0.")
    if given.lora:
        count = export_lora(given.checkpoint, given.out, given.naming)
        print(f"{given.out}: LoRA of {count} linears, alpha merged.")
        return
    parts = export_checkpoint(
        given.checkpoint,
        given.out,
        given.naming,
        base_only=given.base_only,
        dtype=given.dtype,
        max_shard_bytes=int(given.max_shard_gb * 1e9),
    )
    print_table(parts, given.out, given.naming)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    COMMAND.run(main)
