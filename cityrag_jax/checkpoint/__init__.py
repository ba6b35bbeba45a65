"""Models and training states on disk: Orbax behind one door.

One call opens whatever was converted or trained, each network when it is asked for, its
parameters in the type and on the mesh that you want:

    import jax.numpy as jnp
    from cityrag_jax.checkpoint import latest_model
    from cityrag_jax.parallel import make_mesh

    bundle = latest_model(DIR, mesh=make_mesh(fsdp=8), dtype=jnp.bfloat16)
    print(sorted(bundle.modules), bundle.text.shape, bundle.origin)  # nothing read yet
    vae = bundle.modules["vae"]  # read now, digests compared, kept for the next time
    transformer = bundle.modules["transformer"]  # each process reads its own shards
    print(vae.config.z_dim, transformer.config.num_layers)

`bundles.py` says what lies on disk, `items.py` how arrays are cut, `training.py` what a
training workdir holds, `descriptions.py` how a module becomes JSON, `quantise.py` what
int8 kernels are. `README.md` draws the folder.
"""

from cityrag_jax.checkpoint.bundles import (
    FORMAT,
    Bundle,
    Modules,
    abstract_parameters,
    computing_in,
    load_bundle,
    save_bundle,
    verify_bundle,
)
from cityrag_jax.checkpoint.descriptions import (
    COMPUTING,
    Arrays,
    Description,
    abstract_model,
    build_model,
    describe,
    draw_parameters,
    new_model,
    parameter_shardings,
    parameters,
    read_config,
    stacked_parameters,
    with_adapters,
    with_parameters,
    with_statistics,
)
from cityrag_jax.checkpoint.digests import TRUST, Damaged, trust, trusted
from cityrag_jax.checkpoint.disks import hush_writers
from cityrag_jax.checkpoint.quantise import held_in_int8, hold
from cityrag_jax.checkpoint.training import (
    TrainingCheckpoints,
    identify_model,
    latest_model,
    load_frozen,
    save_frozen,
)

__all__ = [
    "COMPUTING",
    "FORMAT",
    "TRUST",
    "Arrays",
    "Bundle",
    "Damaged",
    "Description",
    "Modules",
    "TrainingCheckpoints",
    "abstract_model",
    "abstract_parameters",
    "build_model",
    "computing_in",
    "describe",
    "draw_parameters",
    "held_in_int8",
    "hold",
    "hush_writers",
    "identify_model",
    "latest_model",
    "load_bundle",
    "load_frozen",
    "new_model",
    "parameter_shardings",
    "parameters",
    "read_config",
    "save_bundle",
    "save_frozen",
    "stacked_parameters",
    "trust",
    "trusted",
    "verify_bundle",
    "with_adapters",
    "with_parameters",
    "with_statistics",
]
