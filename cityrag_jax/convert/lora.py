"""LoRA files of Wan's transformer, as others write them: merged on reading; and ours.

A file changes linear maps of a base, W + strength (alpha / rank) up down, and may hold
whole differences of weights (`diff`) and biases (`diff_b`). The linear is named in
official or diffusers' naming behind a prefix, or, by kohya-ss/sd-scripts, with
underscores for dots. alpha is the rank where a file does not give it.

Everything here is in torch's axes and under torch's names: a merged checkpoint reads
like any other.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from cityrag_jax.convert.files import CheckpointReader, write_checkpoint
from cityrag_jax.convert.names import DIT_MODULES, NAMINGS
from cityrag_jax.convert.stored import StoredParameters

PREFIXES = (
    *("base_model.model.", "diffusion_model.", "transformer.", "model.", "unet."),
    *("lora_unet_", "lora_transformer_"),
)
# Behind the linear's name -> what the tensor is.
ROLES = {
    "down": r"\.lora(?:_down|\.down|_A)(?:\.default)?\.weight",
    "up": r"\.lora(?:_up|\.up|_B)(?:\.default)?\.weight",
    "alpha": r"\.alpha",
    "weight": r"\.diff",
    "bias": r"\.diff_b",
}
WRITTEN_PREFIX = {"official": "diffusion_model.", "diffusers": "transformer."}


@dataclasses.dataclass(frozen=True)
class Change:
    """What a file does to one linear or norm: the names of its tensors by role."""

    tensors: Mapping[str, str]

    def weight(self, read, shape: tuple[int, ...]) -> np.ndarray | None:
        """Give the float32 difference of the weight, None if it does not change."""
        total = None
        if "down" in self.tensors:
            down, up = (np.float32(read(self.tensors[r])) for r in ("down", "up"))
            rank = down.shape[0]
            alpha = rank
            if "alpha" in self.tensors:
                alpha = float(read(self.tensors["alpha"]))
            total = (alpha / rank) * (up.reshape(-1, rank) @ down.reshape(rank, -1))
            total = total.reshape(shape)
        if "weight" in self.tensors:
            difference = np.float32(read(self.tensors["weight"]))
            total = difference if total is None else total + difference
        return total

    def bias(self, read) -> np.ndarray | None:
        """Give the float32 difference of the bias, None if it does not change."""
        return (
            np.float32(read(self.tensors["bias"])) if "bias" in self.tensors else None
        )


class Lora:
    """A LoRA file with a strength; `text` is FILE or FILE:STRENGTH.

    Raises ValueError naming every tensor that is of another kind of adapter.
    """

    def __init__(self, text: str):
        path, _, last = text.rpartition(":")
        try:
            self.path, self.strength = Path(path), float(last)
            given = bool(path)
        except ValueError:
            given = False
        if not given:
            self.path, self.strength = Path(text), 1.0
        self.text = text
        self.reader = CheckpointReader(self.path)
        self._tensors = _by_module(self.reader)

    def changes(self, layers: int, naming: str) -> dict[str, Change]:
        """Map modules of a base of so many layers, in a naming, to what changes.

        Raises ValueError naming the modules that no such base has.
        """
        spelled = _spellings(layers, naming)
        unknown = [name for name in self._tensors if name not in spelled]
        if unknown:
            raise ValueError(
                f"{self.path} changes {len(unknown)} modules that the transformer does "
                "not have; is it for another model?\n  " + "\n  ".join(unknown[:20])
            )
        return {spelled[n]: Change(tensors) for n, tensors in self._tensors.items()}


class MergedReader:
    """A checkpoint's reader whose weights have LoRA files merged in, in float32.

    Raises ValueError for a file that does not fit in names or shapes, before anything
    is read.
    """

    def __init__(self, reader, loras: Sequence[Lora], layers: int, naming: str):
        self.path, self._reader = reader.path, reader
        self._parts = [(lora, lora.changes(layers, naming)) for lora in loras]
        problems = [p for part in self._parts for p in self._misfits(*part)]
        if problems:
            raise ValueError("\n".join(problems))

    def names(self) -> set[str]:
        """Give the names of all tensors."""
        return self._reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a tensor's shape without reading it."""
        return self._reader.shape(name)

    def dtype(self, name: str) -> str:
        """Give the type that a tensor is stored in, without reading it."""
        return self._reader.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Read a tensor; float32 if a file changes it, as stored if not."""
        x = self._reader.read(name)
        module, _, leaf = name.rpartition(".")
        for lora, changes in self._parts:
            change = changes.get(module)
            if change is None:
                continue
            if leaf == "bias":
                difference = change.bias(lora.reader.read)
            else:
                difference = change.weight(lora.reader.read, x.shape)
            if difference is not None:
                x = np.float32(x) + lora.strength * difference
        return x

    def _misfits(self, lora: Lora, changes: Mapping[str, Change]) -> Iterator[str]:
        for module, change in changes.items():
            wanted = {
                leaf: self._reader.shape(f"{module}.{leaf}")
                for leaf in ("weight", "bias")
                if f"{module}.{leaf}" in self._reader.names()
            }
            shapes = {r: lora.reader.shape(n) for r, n in change.tensors.items()}
            whole = {
                leaf: shapes[leaf] for leaf in ("weight", "bias") if leaf in shapes
            }
            if ("down" in shapes) != ("up" in shapes):
                yield f"{lora.path}: {module} has only one of its two factors."
            elif "down" in shapes:
                rank, *inward = shapes["down"]
                out, *rest = shapes["up"]
                if int(np.prod(rest)) != rank:
                    yield f"{lora.path}: {module}'s factors {shapes} do not multiply."
                yield from self._check(lora, module, "weight", wanted, (out, *inward))
            for leaf, shape in whole.items():
                yield from self._check(lora, module, leaf, wanted, shape)

    def _check(self, lora, module, leaf, wanted, shape):
        if leaf not in wanted:
            yield f"{lora.path} changes {module}.{leaf}, which the base does not have."
        elif tuple(shape) != tuple(wanted[leaf]):
            yield (
                f"{lora.path}: {module}.{leaf} is {wanted[leaf]} in the base, the file "
                f"changes {tuple(shape)}; is it for another model?"
            )


def _by_module(reader: CheckpointReader) -> dict[str, dict[str, str]]:
    """Group a file's tensors by the module they change, prefixes taken off."""
    grouped: dict[str, dict[str, str]] = {}
    strange = []
    for name in sorted(reader.names()):
        for role, pattern in ROLES.items():
            if match := re.fullmatch(f"(.+?){pattern}", name):
                grouped.setdefault(_bare(match[1]), {})[role] = name
                break
        else:
            strange.append(name)
    if strange or not grouped:
        raise ValueError(
            f"{reader.path} is no LoRA of linear maps: {len(strange)} tensors are "
            "neither low-rank factors, alpha nor differences (DoRA, LoHa and LoKr are "
            "not read); merge it where it was made.\n  " + "\n  ".join(strange[:20])
        )
    return grouped


def _bare(module: str) -> str:
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _spellings(layers: int, naming: str) -> dict[str, str]:
    """Map every way to write a module to its name in a naming."""
    spelled = {}
    for names in DIT_MODULES.values():
        for layer in range(layers) if "{i}" in names[0] else [None]:
            exact = [name.replace("{i}", str(layer)) for name in names]
            ours = exact[NAMINGS.index(naming)]
            for name in exact:
                spelled[name] = spelled[name.replace(".", "_")] = ours
    return spelled


def write_lora(
    stored: StoredParameters,
    scales: Mapping[str, float],
    path: Path | str,
    naming: str,
) -> int:
    """Write a model's adapters as one LoRA file; give how many linears it changes.

    `scales` are those of `adapters.adapter_scales`. They are multiplied into the second
    factor, so that readers which expect alpha and those which know none agree.
    Raises ValueError if there are none, or one stands beside a linear without a name.
    """
    if not scales:
        raise ValueError("The model has no adapters; export it whole.")
    prefix = WRITTEN_PREFIX[naming]
    sources = {}
    for kernel in scales:
        module = kernel.removesuffix(".kernel")
        if module not in DIT_MODULES:
            raise ValueError(
                f"{module} has an adapter, but no name in Wan; export it merged."
            )
        name = DIT_MODULES[module][NAMINGS.index(naming)]
        layers = stored.arrays[kernel].shape[0] if "{i}" in name else None
        for layer in [None] if layers is None else range(layers):
            theirs = prefix + name.replace("{i}", str(layer))
            for factor, torch in (("down", "lora_A"), ("up", "lora_B")):
                ours = f"{module}.adapter.{factor}"
                scale = scales[kernel] if factor == "up" else 1.0
                sources[f"{theirs}.{torch}.weight"] = (ours, layer, scale)

    def read(name: str) -> np.ndarray:
        ours, layer, scale = sources[name]
        x = np.float32(stored.read(ours, layer)) * np.float32(scale)
        return np.ascontiguousarray(x.T).astype(stored.arrays[ours].dtype)

    tensors = {}
    for name, (ours, layer, _) in sources.items():
        x = stored.arrays[ours]
        shape = x.shape if layer is None else x.shape[1:]
        tensors[name] = jax.ShapeDtypeStruct(shape[::-1], x.dtype)
    write_checkpoint(path, tensors, read, {})
    return len(sources) // 2
