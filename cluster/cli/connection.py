"""The flags by which client commands find and talk to a server."""

from __future__ import annotations

import argparse

from cluster.client.connection import DEFAULT_ADDRESS, Connection
from cluster.config.load import CLIENT_TOKEN_VARIABLE, client_token


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --server, the TLS files and --token."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--server", default=DEFAULT_ADDRESS, metavar="HOST[:PORT]", help="the server (default: %(default)s)"
    )
    group.add_argument("--tls-ca", metavar="FILE", help="use TLS, and trust the certificates in this PEM file")
    group.add_argument("--tls-cert", metavar="FILE", help="this client's certificate, if the server asks for one")
    group.add_argument("--tls-key", metavar="FILE", help="the key of --tls-cert")
    group.add_argument(
        "--token", help=f"bearer token; better in {CLIENT_TOKEN_VARIABLE}, where other users of the machine see it not"
    )


def connection_of(args: argparse.Namespace) -> Connection:
    """The connection that the flags describe; the token may come from the environment."""
    return Connection(
        address=args.server,
        tls_ca=args.tls_ca,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        token=args.token or client_token(),
    )
