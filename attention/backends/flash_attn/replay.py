"""Compiled kernels launched again without the library's own way to them, which takes longer than many kernels do.

A library that compiles kernels keeps them in a cache, and works out at every call which of them it wants and what to
pass it. Here that is watched once: a call like an earlier one passes its own tensors to the kernel that ran then, in
the places in which it got them. Nothing is assumed of the library but a cache that is asked for a kernel by `[key]`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Tensors = Sequence[torch.Tensor | None]
Launch = tuple[Callable[..., Any], tuple[Any, ...]]

_MOST_KEPT = 256
_ALIGNMENT = 16
"""Bytes at which kernels want tensors to begin; libraries copy those that do not."""


class WatchedKernels:
    """Stands in for a library's cache of compiled kernels: passes on everything, and notes launches on request.

    Args:
        kernels: the library's own cache.
    """

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._watched = threading.local()

    def __contains__(self, key: object) -> bool:
        return key in self._kernels

    def __getitem__(self, key: Any) -> Callable[..., Any]:
        kernel: Callable[..., Any] = self._kernels[key]
        launches: list[Launch] | None = getattr(self._watched, "launches", None)
        if launches is None:
            return kernel

        def launch(*args: Any, **kwargs: Any) -> Any:
            launches.append((kernel, (*args, kwargs) if kwargs else args))
            return kernel(*args, **kwargs)

        return launch

    def __setitem__(self, key: Any, kernel: Callable[..., Any]) -> None:
        self._kernels[key] = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    @contextmanager
    def watching(self) -> Iterator[list[Launch]]:
        """What this thread launches in this block, in order."""
        launches: list[Launch] = []
        self._watched.launches = launches
        try:
            yield launches
        finally:
            self._watched.launches = None


@dataclass(frozen=True)
class Replay:
    """A launch to be made again with other tensors.

    Attributes:
        kernel: what is launched.
        arguments: what it takes, None where tensors go.
        places: where each tensor goes: (place among the arguments, number among a call's tensors).
    """

    kernel: Callable[..., Any]
    arguments: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]

    def __call__(self, tensors: Tensors) -> None:
        """Launch the kernel with the tensors of a call."""
        arguments = list(self.arguments)
        for place, number in self.places:
            arguments[place] = tensors[number]
        self.kernel(*arguments)


class Replays:
    """Launches by the calls that led to them.

    Args:
        kernels: the library's cache, watched.
    """

    def __init__(self, kernels: WatchedKernels) -> None:
        self._kernels = kernels
        self._kept: dict[Hashable, Replay | None] = {}

    def launch(self, options: Hashable, tensors: Tensors, call: Callable[[], object]) -> None:
        """Do what `call` does, by the launch of an earlier call that was the same but for the tensors' contents.

        Args:
            options: whatever else the call depends on.
            tensors: all that it reads and writes.
            call: the library's own way.
        """
        key = (options, *_signature(tensors))
        kept = self._kept.get(key)
        if kept is not None:
            kept(tensors)
        elif key in self._kept:  # one of those that cannot be replayed
            call()
        else:
            with self._kernels.watching() as launches:
                call()
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[key] = _replay(launches, tensors)


def _signature(tensors: Tensors) -> tuple[Hashable, ...]:
    """What a library could tell calls apart by, contents aside; which tensors are one and the same is part of it."""
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    parts = [
        None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, pointer % _ALIGNMENT)
        for tensor, pointer in zip(tensors, pointers, strict=True)
    ]
    same = tuple(pointers.index(pointer) for pointer in pointers)
    device = next((tensor.device.index for tensor in tensors if tensor is not None), None)
    return (*parts, same, device)


def _replay(launches: Sequence[Launch], tensors: Tensors) -> Replay | None:
    """The launch of a call, if there was just one, of the call's own tensors and of numbers."""
    if len(launches) != 1:
        return None
    kernel, given = launches[0]
    arguments, places = list(given), []
    for place, argument in enumerate(given):
        if isinstance(argument, torch.Tensor):
            number = next((i for i, tensor in enumerate(tensors) if _is_view(argument, tensor)), None)
            if number is None:
                return None
            arguments[place] = None
            places.append((place, number))
        elif not _is_plain(argument):
            return None
    return Replay(kernel, tuple(arguments), tuple(places))


def _is_view(tensor: torch.Tensor, whole: torch.Tensor | None) -> bool:
    """Whether two tensors are the same piece of memory, seen in the same way."""
    return (
        whole is not None
        and (tensor.data_ptr(), tensor.dtype) == (whole.data_ptr(), whole.dtype)
        and (tensor.shape, tensor.stride()) == (whole.shape, whole.stride())
    )


def _is_plain(argument: object) -> bool:
    """Whether an argument is a number, a name or nothing, or made of such."""
    if isinstance(argument, tuple):
        return all(_is_plain(part) for part in argument)
    return argument is None or isinstance(argument, (bool, int, float, str))
