"""Exits with 0 if the gRPC server says that it serves: `healthcheck.py [HOST:PORT] [CA.pem] [--service NAME]`.

Asks the standard health service, which needs no bearer token. With a CA file it speaks TLS.
"""

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 4.0


def serving(address: str, ca: str | None, service: str, name: str | None) -> bool:
    """Whether the server at `address` answers SERVING in time."""
    if ca is None:
        channel = grpc.insecure_channel(address)
    else:
        options = [] if name is None else [("grpc.ssl_target_name_override", name)]
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(Path(ca).read_bytes()), options)
    with channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("ca", nargs="?", metavar="CA.pem", help="use TLS, and trust these certificates")
    parser.add_argument("--service", default="", help="liveness, readiness (the default), or a group of workers")
    parser.add_argument("--name", help="that the server's certificate has, if it is not the address")
    arguments = parser.parse_args()
    sys.exit(0 if serving(arguments.address, arguments.ca, arguments.service, arguments.name) else 1)
