"""Which layers of a model attend to a window of tokens only."""

from __future__ import annotations

from workers.models.config.reader import ConfigReader


def sliding_windows(read: ConfigReader, family: str, num_layers: int) -> tuple[int | None, ...]:
    """For each layer how many tokens a query sees, itself included; None: all.

    Args:
        read: config.json.
        family: as in `ModelConfig`.
        num_layers: of the model.

    Raises:
        CheckpointError: the config says something else, or too little.
    """
    everything: tuple[int | None, ...] = (None,) * num_layers
    if family == "llama":
        _refuse_kinds(read, family, "full_attention")
        return everything
    if family == "mistral":  # transformers takes 4096 where the key is absent; null is no window
        window = read.optional_positive_int("sliding_window") if "sliding_window" in read else 4096
        _refuse_kinds(read, family, "full_attention" if window is None else "sliding_attention")
        return (window,) * num_layers
    window = read.optional_positive_int("sliding_window") if read.flag("use_sliding_window", False) else None
    if window is None:
        return everything
    kinds = read.get("layer_types")
    if kinds is None:
        first = read.non_negative_int("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise read.error("layer_types", f"must be a list of {num_layers} names, one per layer")
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise read.error("layer_types", f"{unknown[0]!r} is not supported, only full_attention and sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _refuse_kinds(read: ConfigReader, family: str, only: str) -> None:
    """Refuse kinds of layers in a family whose layers are all of one."""
    kinds = read.get("layer_types")
    others = [kind for kind in kinds if kind != only] if isinstance(kinds, list) else []
    if others:
        raise read.error("layer_types", f"{others[0]!r} is not supported: all layers of this {family} are {only}")
