"""CityRAG on Wan 2.1 T2V-1.3B: the method for those who have a card or two.

    python -m cityrag_jax.train --config=configs/cityrag_1_3b.py \\
        --config.train.init_from=CONVERTED --config.data.city=DIR --workdir=DIR

There is no image-to-video model of this size: the patch embedding gets the channels of
mask and first image, which start at zero (*assumed*), and there is no CLIP tower. All
else is as in configs/cityrag_14b.py. CONVERTED is made of the published T2V-1.3B by
tools/convert_wan.py. Not trained by us yet.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(variant: str | None = None) -> ConfigDict:
    """Give the only config; there are no variants."""
    if variant is not None:
        raise ValueError(f"configs/cityrag_1_3b.py has no variants, not {variant!r}.")
    config = _large().get_config().unlock()
    config.model.preset = "t2v_1_3b"
    config.model.transformer.in_channels = 36  # 16 noise, 4 mask, 16 first image
    config.optimizer.frozen = ("blocks.cross_attention.*", "text_embedding.*")
    config.train.mesh = dict(data=1, fsdp=1, sequence=1)
    config.train.batch_size = 1
    return config.lock()


def _large():
    """Import the config beside this file: configs are files, no package."""
    path = Path(__file__).with_name("cityrag_14b.py")
    spec = importlib.util.spec_from_file_location("cityrag_14b", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
