"""A transfer of NIXL's under way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from kv_transfer.transports.base import Transfer, TransferState

STATES = {"DONE": TransferState.DONE, "PROC": TransferState.IN_FLIGHT, "ERR": TransferState.FAILED}
"""NIXL's names of them."""


class NixlTransfer(Transfer):
    """A transfer of NIXL's.

    Attributes:
        num_descriptors: that it became, once it has ended; 0 when nobody counts.
    """

    def __init__(
        self,
        agent: Any,
        handle: Any,
        state: TransferState,
        on_failure: Callable[[], None],
        *,
        count_descriptors: bool,
    ) -> None:
        self.num_descriptors = 0
        self._agent: Any = agent
        self._handle: Any = handle
        self._state = state
        self._count = count_descriptors
        self._on_failure = on_failure
        if state is not TransferState.IN_FLIGHT:
            self._release()

    def state(self) -> TransferState:
        """See `Transfer.state`."""
        if self._state is TransferState.IN_FLIGHT:
            try:
                self._state = STATES[self._agent.check_xfer_state(self._handle)]
            except Exception:  # nixlRemoteDisconnectError and its like: the peer is gone, so the transfer has ended
                self._state = TransferState.FAILED
            if self._state is TransferState.FAILED:
                self._on_failure()
            if self._state is not TransferState.IN_FLIGHT:
                self._release()
        return self._state

    def abandon(self) -> None:
        """Its endpoint is being closed: it has failed, if it has not ended before."""
        if self._state is TransferState.IN_FLIGHT:
            self._state = TransferState.FAILED
            self._release()

    def _release(self) -> None:
        if self._count:
            with contextlib.suppress(Exception):
                self.num_descriptors = int(self._agent.get_xfer_telemetry(self._handle).descCount)
        self._agent.release(self._handle)
        self._agent = self._handle = None
