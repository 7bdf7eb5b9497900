"""The Python client."""

from cluster.client.client import BatonClient

__all__ = ["BatonClient"]
