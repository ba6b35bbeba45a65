"""A folder of Wan weights becomes a CityRAG bundle, tensor by tensor.

One item of the bundle (a block) is in memory at a time. All is written to a hidden
folder beside the output, with `progress.json`: what is converted, how, and the digests
of finished items. Killed and started again it goes on with the next item; at the end
the folder is renamed. Bad input leaves nothing behind.
"""

import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from cityrag_jax.checkpoint import memory
from cityrag_jax.checkpoint.bundles import (
    CONFIG,
    TEXTS,
    Bundle,
    is_bundle,
    write_config,
    write_texts,
)
from cityrag_jax.checkpoint.digests import sum_arrays
from cityrag_jax.checkpoint.disks import describe_cause, find_cause
from cityrag_jax.checkpoint.files import read_json, write_json
from cityrag_jax.checkpoint.items import DIGESTS, write_item
from cityrag_jax.convert.lora import Lora
from cityrag_jax.convert.plan import (
    BRANCH_TENSORS,
    PLANNERS,
    NetworkPlan,
    branch_of,
    num_bytes,
    plan_network,
)
from cityrag_jax.convert.prompt import (
    encode_prompts,
    find_text_encoder,
    read_text_config,
)
from cityrag_jax.convert.source import WanFolder, open_folder
from cityrag_jax.int8 import parameter_of
from cityrag_jax.progress import Progress

# The fixed prompt of the paper (appendix A), verbatim.
PROMPT = (
    "A photorealistic, cinematic video of a city street. The camera performs a smooth, "
    "steady tracking shot moving along the asphalt road, maintaining a consistent "
    "level angle that offers an immersive street-level perspective."
)
PARTS = ("transformer", "vae", "clip", "text")
PROGRESS = "progress.json"
LICENCE = "Apache-2.0"  # of the published Wan 2.1 weights
PIECE = 2**18
SPARE_BYTES = 2**26  # metadata of Orbax and the texts take less


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was read of a part, and what it should have been."""

    part: str
    tensors: int
    parameters: int
    expected: int
    num_bytes: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Everything that is known before the first tensor is read."""

    folder: WanFolder
    out: Path
    dtype: str
    prompt: str
    with_text: bool
    networks: tuple[NetworkPlan, ...]
    loras: tuple[Lora, ...] = ()

    @property
    def temporary(self) -> Path:
        """The hidden folder that becomes the output."""
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def items(self) -> list[tuple[NetworkPlan, str]]:
        """List all items in the order in which they are written."""
        return [(network, item) for network in self.networks for item in network.items]


def plan_conversion(
    source: Path | str,
    out: Path | str,
    *,
    dtype: DTypeLike = "bfloat16",
    parts: Sequence[str] | None = None,
    prompt: str = PROMPT,
    loras: Sequence[str] = (),
) -> Conversion:
    """Check paths, files, names, shapes and types; `parts` None means all there are.

    `loras` are files to merge into the transformer, FILE or FILE:STRENGTH.
    Raises one ValueError with every problem of every part.
    """
    source, out = Path(source), Path(out).absolute()
    if out.resolve() == source.resolve():
        raise ValueError(
            f"--source and --out are both {out.resolve()}; choose another."
        )
    folder = open_folder(source)
    wanted = list(parts or [p for p in PARTS if p != "clip" or folder.takes_image])
    unknown = sorted(set(wanted) - set(PARTS))
    problems = [f"--parts={p} is none of {', '.join(PARTS)}." for p in unknown]
    networks, merged = [], []
    for text in loras:
        try:
            merged.append(Lora(text))
        except ValueError as error:
            problems.append(f"--lora: {error}")
    for part in PARTS:
        try:
            if part in wanted and part in PLANNERS:
                networks.append(plan_network(part, folder, dtype, merged))
            elif part in wanted:
                _check_text_encoder(source, networks)
        except ValueError as error:
            problems.append(f"{part}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    name = np.dtype(dtype).name
    with_text = "text" in wanted
    return Conversion(
        folder, out, name, prompt, with_text, tuple(networks), tuple(merged)
    )


def _check_text_encoder(source: Path, networks: Sequence[NetworkPlan]) -> None:
    weights, _ = find_text_encoder(source)
    width = read_text_config(weights).dim
    for network in networks:
        wanted = network.description["config"].get("text_dim", width)
        if wanted != width:
            raise ValueError(
                f"{weights} gives features of {width}, the {network.name} takes "
                f"{wanted}; they are not of the same checkpoint."
            )


def is_done(plan: Conversion) -> bool:
    """Say whether the output is there, made of what is planned.

    Raises ValueError if something else has its name.
    """
    out = plan.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    stored = read_json(out / CONFIG) if is_bundle(out) else {}
    modules = {network.name: network.description for network in plan.networks}
    planned = {"modules": modules, "source": _describe_source(plan)}
    if any(stored.get(name) != x for name, x in _as_json(planned).items()):
        raise ValueError(f"{out} exists; delete it or choose another name.")
    return True


def convert(plan: Conversion) -> list[Row]:
    """Write the planned bundle, or go on with it; give the table of what was read.

    Nothing is written if it is there already.
    Raises ValueError, and leaves nothing, if a value is not finite; ValueError with the
    remedy, leaving what is finished, if the disk is or becomes full.
    """
    if is_done(plan):
        return table(plan)
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    work = _Work(plan)
    work.check_space()
    if plan.with_text and "texts" not in work.done:
        work.write_texts()
    total = sum(network.num_bytes(item) for network, item in plan.items)
    with Progress(f"converting to {plan.out.name}", total, "byte") as bar:
        for network, item in plan.items:
            work.write_item(network, item, bar)
    work.finish()
    return table(plan, work.done)


class _Work:
    """The hidden folder and what is finished in it."""

    def __init__(self, plan: Conversion):
        self.plan, self.folder = plan, plan.temporary
        self.broken: list[str] = []
        self.made_from = _fingerprint(plan)
        if self.folder.exists():
            self.done = self._read_progress()
        else:
            self.done: dict[str, dict[str, int]] = {}
            self.folder.mkdir()
            self._save_progress()

    def _read_progress(self):
        path = self.folder / PROGRESS
        if not path.exists():  # killed before it was written
            self._save_progress({})
            return {}
        record = read_json(path)
        stored = record["made_from"]
        changed = [key for key, value in self.made_from.items() if stored[key] != value]
        if changed:
            lines = [f"{k}: {stored[k]} then, {self.made_from[k]} now" for k in changed]
            raise ValueError(
                f"{self.folder} is an unfinished conversion of something else. Delete "
                "it, or go on with what it was started with:\n  " + "\n  ".join(lines)
            )
        return record["done"]

    def _save_progress(self, done=None):
        record = {
            "made_from": self.made_from,
            "done": self.done if done is None else done,
        }
        write_json(self.folder / PROGRESS, record)

    def check_space(self) -> None:
        """Refuse before writing if what is missing does not fit the disk."""
        needed = SPARE_BYTES + sum(
            network.num_bytes(item)
            for network, item in self.plan.items
            if _key(network, item) not in self.done
        )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            if not self.done:
                shutil.rmtree(self.folder)
            raise ValueError(
                f"{self.plan.out} needs {needed:,} more bytes, the disk has {free:,}; "
                "free some, convert to int8, or choose another disk."
            )

    def write_texts(self) -> None:
        """Encode the prompt and the empty one."""
        try:
            rows = encode_prompts(self.plan.folder.path, [self.plan.prompt, ""])
            if not all(np.isfinite(x).all() for x in rows):
                raise ValueError("The text encoder's features are not finite.")
        except ValueError:
            self._discard()
            raise
        memory.give_back()
        write_texts(self.folder, *rows)
        digests = {n: zlib.crc32(x.tobytes()) for n, x in zip(TEXTS, rows, strict=True)}
        self.done["texts"] = digests
        self._save_progress()

    def write_item(self, network: NetworkPlan, item: str, bar: Progress) -> None:
        """Make one item's arrays and write them, unless it is finished or bad."""
        if _key(network, item) in self.done:
            bar.update(network.num_bytes(item))
            return
        arrays = {}
        for name, x in network.make(item):
            ours = parameter_of(name)  # the scales of a kernel show its NaN and Inf
            if ours not in network.copied and not is_finite(np.asarray(x)):
                names = network.sources(item, ours) or (ours,)
                self.broken += [n for n in names if n not in self.broken]
            if not self.broken:
                arrays[name] = x
            bar.update(x.nbytes)
        if self.broken:  # go on looking for more, but write no longer
            return
        path = self.folder / network.name / item
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)
        try:
            # Sums: of shards, too, each process can make its own.
            digests = write_item(path, arrays, compress=False, digest=sum_arrays)
        except Exception as error:  # tensorstore and Orbax raise many kinds
            shutil.rmtree(path, ignore_errors=True)
            raise _not_written(self.folder, error) from error
        self.done[_key(network, item)] = digests
        self._save_progress()

    def finish(self) -> None:
        """Write what describes the bundle and give it its name."""
        if self.broken:
            self._discard()
            raise ValueError(
                f"{len(self.broken)} tensors hold NaN or Inf as {self.plan.dtype}; "
                "fetch the files again, or convert to float32 if they are too large:\n"
                "  " + "\n  ".join(self.broken)
            )
        for network in self.plan.networks:
            digests = {item: self.done[_key(network, item)] for item in network.items}
            write_json(self.folder / network.name / DIGESTS, digests)
        write_config(self.folder, self._bundle())
        (self.folder / PROGRESS).unlink()
        os.rename(self.folder, self.plan.out)

    def _bundle(self) -> Bundle:
        plan = self.plan
        texts = [None, None]
        if plan.with_text:
            texts = [np.load(self.folder / f"{name}.npy") for name in TEXTS]
        names = [network.name for network in plan.networks]
        return Bundle(
            dict.fromkeys(names),
            {network.name: network.description for network in plan.networks},
            texts[0],
            "new",
            texts[1],
            _describe_source(plan),
            LICENCE,
        )

    def _discard(self) -> None:
        shutil.rmtree(self.folder)


def table(plan: Conversion, done: dict[str, dict[str, int]] | None = None) -> list[Row]:
    """Count what is read of each part; checksums once they are known."""
    rows = []
    for network in plan.networks:
        for title, prefix, expected in network.rows:
            rows.append(_row(network, title, prefix, expected, done))
    return rows


def _row(network, title, prefix, expected, done) -> Row:
    tensors, count, size, crc = 0, 0, 0, 0
    for item, parameters in network.items.items():
        for ours, x in network.stored(item).items():
            if branch_of(ours) != prefix:
                continue
            if ours in network.read:
                tensors += len(network.sources(item, ours))
            count += math.prod(x.shape) if ours in parameters else 0
            size += num_bytes(x)
            if done is not None:
                digest = done[_key(network, item)][ours]
                crc = zlib.crc32(digest.to_bytes(8, "little"), crc)
    checksum = "" if done is None else f"{crc:08x}"
    return Row(title, tensors, count, expected, size, checksum)


def is_finite(x: np.ndarray) -> bool:
    """Say whether no value is NaN or Inf, by pieces that fit the cache.

    Of bfloat16 by the bits of the exponent, which is fast.
    """
    flat = x.reshape(-1)
    pieces = (flat[i : i + PIECE] for i in range(0, flat.size, PIECE))
    if x.dtype.name != "bfloat16":
        return all(np.isfinite(piece).all() for piece in pieces)
    exponent = np.uint16(0x7F80)
    bits = (piece.view(np.uint16) & exponent for piece in pieces)
    return not any((piece == exponent).any() for piece in bits)


def _key(network: NetworkPlan, item: str) -> str:
    return f"{network.name}/{item}"


def _fingerprint(plan: Conversion) -> dict[str, Any]:
    """Say what is converted and how: another source or option is another conversion."""
    files = {
        str(path): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in _files(plan)
    }
    made_from = {
        "source": str(plan.folder.path.resolve()),
        "files": files,
        "dtype": plan.dtype,
        "parts": [n.name for n in plan.networks] + ["text"] * plan.with_text,
        "prompt": plan.prompt,
        "loras": [lora.text for lora in plan.loras],
    }
    return _as_json(made_from)


def _as_json(document: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(document))


def _files(plan: Conversion) -> list[Path]:
    places = [plan.folder.weights[network.name] for network in plan.networks]
    if plan.with_text:
        places.append(find_text_encoder(plan.folder.path)[0])
    found = {lora.path for lora in plan.loras}
    for place in places:
        beside = place if place.is_dir() else place.parent
        found |= set(beside.glob("*.json")) | set(beside.glob("*.safetensors"))
        found |= {place} if place.is_file() else set()
    return sorted(found)


def _describe_source(plan: Conversion) -> dict[str, Any]:
    """Say in config.json where the weights come from, without this machine's paths."""
    root = plan.folder.path
    branches = {}
    for network in plan.networks:
        for prefix, theirs in BRANCH_TENSORS.items():
            if network.name == "transformer":
                held = any(ours.startswith(prefix) for ours in network.read)
                branches[theirs.rstrip(".")] = "read" if held else "initialised"
    return {
        "model": "Wan 2.1",
        "layout": plan.folder.layout,
        "files": {
            str(path.relative_to(root)): path.stat().st_size
            for path in _files(plan)
            if path.is_relative_to(root)
        },
        "loras": {lora.path.name: lora.strength for lora in plan.loras},
        "branches": branches,
        "prompt": plan.prompt if plan.with_text else "",
        "dtype": plan.dtype,
        "converted_by": "tools/convert_wan.py",
    }


def _not_written(folder: Path, error: Exception) -> ValueError:
    full = "No space" in find_cause(error)
    advice = "The disk is full: free some space" if full else "Look at the disk"
    return ValueError(
        f"{folder} could not be written ({describe_cause(error)}). {advice} and start "
        "again: finished parts are kept. Or delete that folder."
    )
