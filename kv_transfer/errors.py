"""What can go wrong while KV cache blocks move."""


class KVTransferError(Exception):
    """Base of this package's errors; its text is fit for a user."""


class LayoutMismatchError(KVTransferError):
    """Two workers keep their KV cache in ways that do not fit together; the text lists each difference."""


class PeerError(KVTransferError):
    """A peer is unknown, unreachable or gone."""


class NotConnectedError(PeerError):
    """A peer that was never added, or has been removed: nothing was sent to it."""


class ProtocolError(KVTransferError):
    """A message that this version does not understand."""
