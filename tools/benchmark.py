"""Time the networks at full size with random weights, and diffusers' beside them.

    python tools/benchmark.py --parts=base,geo,vae --peer=diffusers --out=result.json

    base   the I2V-14B forward, 29,640 tokens (73 frames of 832x480), batch 1, bfloat16
    geo    the same with the geo branch, its condition as long as the target
    vae    encoding and decoding of 73 frames, bfloat16
    peer   diffusers' classes of the same sizes for `base` and `vae`, eager and with
           compiled blocks, for each attention backend that works

Needs a GPU of 80 GB or more; `--size=tiny` runs anywhere and shows only that the
tool works. Every part runs in a process of its own, so that no two hold the GPU's
memory at once and one that fails leaves the others their figures. TFLOP/s divide what
`cityrag_jax.flops` counts by the median; weights are random because products of zeros
run faster. Times are of the compiled program, the host waiting for its result.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cityrag_jax.commands import Command

PARTS = ("base", "geo", "vae")
PEERS = {"base": "peer_base", "vae": "peer_vae"}
GIB = 2**30

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of what is timed: preset or overrides of the networks, and the video."""

    transformer: dict[str, Any]
    autoencoder: dict[str, Any]
    frames: int
    height: int
    width: int

    def grid(self) -> tuple[int, int, int]:
        """Give the latent (t, h, w)."""
        from cityrag_jax.batch import latent_shape

        return latent_shape(self.frames, self.height, self.width)

    def tokens(self) -> int:
        """Count the tokens of the video."""
        from cityrag_jax.batch import token_grid

        return math.prod(token_grid(self.grid()))


_TINY = dict(dim=64, num_heads=2, num_layers=2, ffn_dim=96, text_dim=32, text_len=16)
_TINY_VAE = dict(
    base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,)
)
SIZES = {
    "full": Size({}, {}, 73, 480, 832),
    "tiny": Size(_TINY, _TINY_VAE, 5, 16, 32),
}


# ------------------------------------------------------------------- ours, in JAX


def dit_config(size: Size):
    """Give I2V-14B with the size's overrides, bfloat16 arithmetic and weights."""
    import jax.numpy as jnp

    from cityrag_jax.model.dit import DiTConfig

    kinds = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return DiTConfig.i2v_14b(**size.transformer, **kinds)


def vae_config(size: Size):
    """Give Wan's autoencoder with the size's overrides, in bfloat16."""
    import jax.numpy as jnp

    from cityrag_jax.model.vae import VAEConfig

    kinds = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return VAEConfig(**size.autoencoder, **kinds)


def latent_shape(config, size: Size) -> tuple[int, ...]:
    """Give the shape of the video's latents by an autoencoder's own strides."""
    side = config.space_stride
    frames = 1 + (size.frames - 1) // config.time_stride
    return 1, frames, size.height // side, size.width // side, config.z_dim


def random_weights(make: Callable[[], Any]) -> tuple[Any, Any]:
    """Build a module's graph and draw its parameters on the device, none of them zero.

    Norm scales are near 1, all else is uniform with deviation 0.02. Nothing is made on
    the host; stacked parameters are drawn layer by layer, which bounds the memory.
    """
    import jax
    from flax import nnx

    graph, abstract = nnx.split(nnx.eval_shape(make))
    leaves, structure = jax.tree.flatten_with_path(abstract)
    limit = 0.02 * 3**0.5

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key, shape, dtype, mean):
        def layer(key):
            low, high = mean - limit, mean + limit
            return jax.random.uniform(key, shape[1:], dtype, low, high)

        return jax.lax.map(layer, jax.random.split(key, shape[0]))

    # The hardware's generator: threefry would take longer than all that is timed.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    drawn = []
    for key, (path, leaf) in zip(keys, leaves, strict=True):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        stacked = leaf.shape if leaf.ndim > 1 else (1, *leaf.shape)
        value = draw(key, stacked, leaf.dtype, mean)
        drawn.append(value.reshape(leaf.shape))
    return graph, jax.block_until_ready(jax.tree.unflatten(structure, drawn))


def time_program(
    function: Callable[..., Any], arguments: tuple, repeats: int, flops: int
) -> Figures:
    """Compile, run twice unmeasured, then time; memory as the compiler states it."""
    import jax

    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    figures: Figures = {"compile_s": time.perf_counter() - start}
    memory = compiled.memory_analysis()
    if memory is not None:
        figures["temporaries_gib"] = memory.temp_size_in_bytes / GIB
        figures["arguments_gib"] = memory.argument_size_in_bytes / GIB

    def run():
        jax.block_until_ready(compiled(*arguments))

    figures |= timings(run, repeats, flops)
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of_device:
        figures["peak_gib"] = statistics_of_device["peak_bytes_in_use"] / GIB
    return figures


def timings(run: Callable[[], None], repeats: int, flops: int) -> Figures:
    """Time a blocking call after two unmeasured ones."""
    for _ in range(2):
        run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "seconds_all": seconds,
        "pflop": flops / 1e15,
        "tflop_per_s": flops / median / 1e12,
    }


def time_transformer(size: Size, repeats: int, *, geo: bool) -> Figures:
    """Time one forward, the branch's own preparation included."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from cityrag_jax import flops
    from cityrag_jax.batch import Conditions
    from cityrag_jax.model.dit import WanDiT
    from cityrag_jax.model.geo_branch import GeoBranch

    config, tokens = dit_config(size), size.tokens()

    def make():
        rngs = nnx.Rngs(0)
        branches = (GeoBranch(config, rngs=rngs),) if geo else ()
        return WanDiT(config, branches=branches, rngs=rngs)

    start = time.perf_counter()
    graph, state = random_weights(make)
    figures: Figures = {"weights_s": time.perf_counter() - start, "tokens": tokens}

    def forward(state, latents, timesteps, text, image, condition):
        model = nnx.merge(graph, state)
        prepared = ()
        if geo:
            length = jnp.full(1, condition.shape[1], jnp.int32)
            conditions = Conditions(text, geo_latents=condition, geo_length=length)
            prepared = model.prepare(conditions)
        return model(latents, timesteps, text, image, prepared)

    shapes = {
        "latents": (1, *size.grid(), config.in_channels),
        "text": (1, config.text_len, config.text_dim),
        "image": (1, flops.IMAGE_TOKENS, config.image_dim),
        "condition": (1, *size.grid(), 16),
    }
    latents, text, image, condition = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate(shapes.values())
    )
    arguments = (state, latents, jnp.full(1, 500.0), text, image, condition)
    cost = flops.total(flops.dit(config, tokens)).flops
    if geo:
        cost += flops.total(flops.geo_branch(config, tokens, tokens)).flops
    return figures | time_program(forward, arguments, repeats, cost)


def time_autoencoder(size: Size, repeats: int) -> Figures:
    """Time streamed encoding and decoding of one video."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from cityrag_jax import flops
    from cityrag_jax.model.vae import WanVAE

    config = vae_config(size)
    graph, state = random_weights(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    video_size = (size.frames, size.height, size.width)
    video = jax.random.uniform(
        jax.random.key(0), (1, *video_size, 3), jnp.bfloat16, minval=-1
    )
    latents = jax.random.normal(jax.random.key(1), latent_shape(config, size))

    def encode(state, video):
        return nnx.merge(graph, state).encode(video)

    def decode(state, latents):
        return nnx.merge(graph, state).decode(latents)

    costs = flops.vae_encode(config, *video_size), flops.vae_decode(config, *video_size)
    encode_flops, decode_flops = (flops.total(cost).flops for cost in costs)
    return {
        "encode": time_program(encode, (state, video), repeats, encode_flops),
        "decode": time_program(decode, (state, latents), repeats, decode_flops),
    }


# ------------------------------------------------------------- theirs, in PyTorch


def time_peer(variants: dict[str, Callable[[], Any]], repeats: int, flops: int):
    """Time calls on PyTorch's device; a variant that fails leaves its error."""
    import torch

    on_gpu = torch.cuda.is_available()
    figures: Figures = {}
    for name, call in variants.items():

        def run(call=call):
            call()
            if on_gpu:
                torch.cuda.synchronize()

        try:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                figures[name] = timings(run, repeats, flops)
            if on_gpu:
                figures[name]["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        except Exception as error:
            figures[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return figures


def time_peer_transformer(size: Size, repeats: int) -> Figures:
    """Time diffusers' WanTransformer3DModel on the same sizes and random data."""
    import torch
    from diffusers import WanTransformer3DModel
    from diffusers.models.attention_dispatch import attention_backend

    from cityrag_jax import flops

    config = dit_config(size)
    make = dict(device=_torch_device(), dtype=torch.bfloat16)
    model = _in_bfloat16(
        lambda: WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            image_dim=config.image_dim,
            added_kv_proj_dim=config.dim,
        )
    )
    inputs = dict(
        hidden_states=torch.randn(1, config.in_channels, *size.grid(), **make),
        timestep=torch.tensor([500], device=make["device"]),
        encoder_hidden_states=torch.randn(1, config.text_len, config.text_dim, **make),
        encoder_hidden_states_image=torch.randn(
            1, flops.IMAGE_TOKENS, config.image_dim, **make
        ),
        return_dict=False,
    )

    def forward(backend: str):
        def call():
            with attention_backend(backend):
                return model(**inputs)

        return call

    on_gpu = torch.cuda.is_available()
    backends = ("native", "_native_cudnn") if on_gpu else ("native",)
    cost = flops.total(flops.dit(config, size.tokens())).flops
    eager = {f"eager{backend}": forward(backend) for backend in backends}
    figures = time_peer(eager, repeats, cost)
    if on_gpu:
        model.compile_repeated_blocks(fullgraph=True)
        compiled = {f"compiled{backend}": forward(backend) for backend in backends}
        figures |= time_peer(compiled, repeats, cost)
    return figures


def time_peer_autoencoder(size: Size, repeats: int) -> Figures:
    """Time diffusers' AutoencoderKLWan on the same video size."""
    import torch
    from diffusers import AutoencoderKLWan

    from cityrag_jax import flops

    config, device = vae_config(size), _torch_device()
    model = _in_bfloat16(
        lambda: AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        )
    )
    video_size = (size.frames, size.height, size.width)
    video = torch.rand(1, 3, *video_size, device=device, dtype=torch.bfloat16) * 2 - 1
    batch, *grid, channels = latent_shape(config, size)
    latents = torch.randn(batch, channels, *grid, device=device, dtype=torch.bfloat16)
    costs = flops.vae_encode(config, *video_size), flops.vae_decode(config, *video_size)
    encode_flops, decode_flops = (flops.total(cost).flops for cost in costs)
    encode = {"encode": lambda: model.encode(video)}
    decode = {"decode": lambda: model.decode(latents)}
    figures = time_peer(encode, repeats, encode_flops)
    return figures | time_peer(decode, repeats, decode_flops)


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _in_bfloat16(make: Callable[[], Any]) -> Any:
    """Build a model straight on the device in bfloat16, frozen."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(_torch_device()):
        model = make()
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


# --------------------------------------------------------------- one process a part

WORKERS: dict[str, Callable[[Size, int], Figures]] = {
    "base": lambda size, repeats: time_transformer(size, repeats, geo=False),
    "geo": lambda size, repeats: time_transformer(size, repeats, geo=True),
    "vae": time_autoencoder,
    "peer_base": time_peer_transformer,
    "peer_vae": time_peer_autoencoder,
}


def environment(peer: bool) -> Figures:
    """Say on what and with which versions a part ran."""
    if peer:
        import diffusers
        import torch

        on_gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if on_gpu else "cpu"
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        return {"device": device, **versions}
    import jax

    flags = os.environ.get("XLA_FLAGS", "")
    device = jax.devices()[0].device_kind
    return {"device": device, "jax": jax.__version__, "xla_flags": flags}


def run_worker(part: str, size: str, repeats: int) -> Figures:
    """Time one part in this process."""
    figures = environment(peer=part.startswith("peer_"))
    return figures | WORKERS[part](SIZES[size], repeats)


def run_part(part: str, size: str, repeats: int, timeout_s: float) -> Figures:
    """Time one part in a process of its own; its failure comes back as `error`."""
    command = [sys.executable, __file__, f"--worker={part}", f"--size={size}"]
    command.append(f"--repeats={repeats}")
    # The peer only counts with our code; JAX must not reserve the GPU beside it.
    environment = dict(os.environ)
    if part.startswith("peer_"):
        environment["JAX_PLATFORMS"] = "cpu"
    try:
        process = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout_s:.0f} s; raise --timeout"}
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        return {"error": f"exit status {process.returncode}, see its output above"}
    return json.loads(lines[-1])


def summary(figures: Figures, name: str) -> list[str]:
    """Give one readable line for every timing of a part."""
    if "error" in figures:
        return [f"{name:<28} failed: {figures['error']}"]
    lines = []
    if "seconds" in figures:
        memory = figures.get("peak_gib", figures.get("temporaries_gib", math.nan))
        lines.append(
            f"{name:<28}{figures['seconds']:>10.4f} s"
            f"{figures['tflop_per_s']:>10.1f} TFLOP/s{memory:>9.2f} GiB"
        )
    for key, value in figures.items():
        if isinstance(value, dict):
            lines += summary(value, f"{name} {key}")
    return lines


COMMAND = Command(__doc__)
COMMAND.takes("--parts", default=",".join(PARTS), help="some of these")
COMMAND.takes("--peer", choices=["diffusers"], help="time it beside ours")
COMMAND.takes("--size", choices=sorted(SIZES), default="full", help="of everything")
COMMAND.takes("--repeats", type=int, default=5, help="timed calls")
COMMAND.takes("--timeout", type=float, default=900, help="seconds for a part")
COMMAND.makes(
    "--out", needed=False, type=Path, help="JSON file, rewritten after every part"
)
COMMAND.takes("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    """Run the parts one after the other; the exit status is 1 if any failed."""
    parts = [part for part in options.parts.split(",") if part]
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(
            f"--parts: no part {', '.join(unknown)}; choose from {', '.join(PARTS)}."
        )
    if options.worker:
        try:
            figures = run_worker(options.worker, options.size, options.repeats)
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(figures), flush=True)
        return 0
    if options.peer:
        parts += [PEERS[part] for part in parts if part in PEERS]
    results: Figures = {}
    for part in parts:
        figures = run_part(part, options.size, options.repeats, options.timeout)
        results[part] = figures
        print("\n".join(summary(figures, part)), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=2) + "\n")
    return int(any("error" in figures for figures in results.values()))


if __name__ == "__main__":
    COMMAND.run(main)
