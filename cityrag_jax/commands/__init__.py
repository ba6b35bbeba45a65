"""The command lines of doors and tools: one style of options, one line for an error.

`command.py` holds options, help and exit codes, `config_files.py` reads `--config` and
`--config.section.key=value`, `config_keys.py` says what every key means,
`config_defaults.py` what it is where no file says.
"""

from cityrag_jax.commands.command import Command, is_refusal
from cityrag_jax.commands.config_files import (
    change_config,
    find_shipped,
    load_config,
)

__all__ = ["Command", "change_config", "find_shipped", "is_refusal", "load_config"]
