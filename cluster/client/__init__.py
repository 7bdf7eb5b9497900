"""The Python client: `BatonClient` and `AsyncBatonClient`. Importing it loads neither torch nor Ray."""

from cluster.client.async_client import AsyncBatonClient
from cluster.client.client import BatonClient
from cluster.client.connection import Connection
from cluster.client.errors import BatonClientError
from cluster.conversation.deltas import MessageBuilder
from workers.sampling_params import SamplingParams

__all__ = ["AsyncBatonClient", "BatonClient", "BatonClientError", "Connection", "MessageBuilder", "SamplingParams"]
