"""All doors of a service as one: gRPC's, and beside it OpenAI's HTTP if that is wanted."""

from __future__ import annotations

import asyncio
from typing import Protocol

from cluster.api import Engine, ModelInfo
from cluster.config.schema import ServerConfig
from cluster.gateway.readiness import WELL, Health
from cluster.generation.text_generation import Generation
from cluster.server.credentials import http_credentials_of
from cluster.server.grpc.listen import check_access, check_server, exposure_warnings
from cluster.server.grpc.serve import Server
from cluster.server.openai.listen import check_http, http_exposure_warnings, tls_of
from cluster.server.openai.serve import HttpServer


class Door(Protocol):
    """What clients come through."""

    @property
    def num_calls(self) -> int:
        """Calls of new work that are under way."""
        ...

    async def open(self) -> None:
        """Listen, and answer health checks."""
        ...

    async def starting(self, step: str) -> None:
        """Tell who asks what the start is at."""
        ...

    async def serve(self, generation: Generation, engine: Engine, model_info: ModelInfo, found: Health = WELL) -> None:
        """Answer calls from now on."""
        ...

    async def report(self, found: Health) -> None:
        """How the service is."""
        ...

    async def drain(self, timeout_s: float) -> int:
        """Refuse new work, and wait for the calls under way; returns those that are left."""
        ...

    async def stop(self, grace_s: float = 5.0) -> None:
        """Drain, end what is left, and close."""
        ...


def check_files(config: ServerConfig) -> None:
    """Refuse TLS files, tokens and keys that cannot be used.

    Raises:
        ConfigError: one is missing or wrong.
    """
    check_access(config)
    if config.http.enabled:
        tls_of(config.http)
        http_credentials_of(config)


async def check_doors(config: ServerConfig) -> list[str]:
    """Find out early, before a model is loaded, whether the doors can be opened; returns what a user should know.

    Raises:
        ConfigError: an address cannot be listened on, or a TLS file, a token or a key is missing or wrong.
    """
    await check_server(config)
    if config.http.enabled:
        http_credentials_of(config)
        await asyncio.to_thread(check_http, config.http)
    return exposure_warnings(config) + http_exposure_warnings(config.http)


class Doors:
    """Every door, opened and closed together."""

    def __init__(self, config: ServerConfig) -> None:
        self._grpc = Server(config)
        self._http = HttpServer(config) if config.http.enabled else None
        self._all: list[Door] = [self._grpc] if self._http is None else [self._grpc, self._http]

    @property
    def address(self) -> str:
        """host:port of the gRPC server, as a client on this machine would write it."""
        return self._grpc.address

    @property
    def port(self) -> int:
        """Of the gRPC server."""
        return self._grpc.port

    @property
    def http_url(self) -> str:
        """Of the HTTP server; empty: there is none."""
        return "" if self._http is None else self._http.url

    @property
    def num_calls(self) -> int:
        """Calls of new work that are under way."""
        return sum(door.num_calls for door in self._all)

    async def open(self) -> None:
        """Listen, and answer health checks.

        Raises:
            ConfigError: an address cannot be listened on, or a TLS file, a token or a key is missing or wrong.
        """
        opened: list[Door] = []
        try:
            for door in self._all:
                await door.open()
                opened.append(door)
        except BaseException:
            for door in opened:
                await door.stop(grace_s=0)
            raise

    async def starting(self, step: str) -> None:
        """Tell who asks what the start is at."""
        for door in self._all:
            await door.starting(step)

    async def serve(self, generation: Generation, engine: Engine, model_info: ModelInfo, found: Health = WELL) -> None:
        """Answer calls from now on; `found` is how the service is, until the next `report`."""
        for door in self._all:
            await door.serve(generation, engine, model_info, found)

    async def report(self, found: Health) -> None:
        """How the service is, for health checks."""
        for door in self._all:
            await door.report(found)

    async def drain(self, timeout_s: float) -> int:
        """Refuse new work with its reason, and wait for the calls under way.

        Returns:
            Calls that are still under way after `timeout_s` seconds.
        """
        return sum(await asyncio.gather(*(door.drain(timeout_s) for door in self._all)))

    async def stop(self, grace_s: float = 5.0) -> None:
        """Drain for `grace_s` seconds, end what is left, and close all connections."""
        await asyncio.gather(*(door.stop(grace_s) for door in self._all))
