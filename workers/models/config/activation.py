"""Reading which activation a family's MLPs have."""

from __future__ import annotations

from workers.errors import ConfigError
from workers.layers.activation import GatedActivation
from workers.loading.config_reader import ConfigReader


def read_activation(read: ConfigReader, key: str) -> GatedActivation:
    """The gated activation that a config names; SiLU where it names none.

    Raises:
        CheckpointError: none that Baton has; names file and key.
    """
    name = read.get_or_default(key)
    try:
        return GatedActivation.named("silu" if name is None else str(name))
    except ConfigError as error:
        raise read.error(key, str(error)) from error
