"""Exits with 0 if the gRPC server says that it serves: `healthcheck.py [HOST:PORT] [CA.pem]`.

Asks the standard health service, which needs no bearer token. With a CA file it speaks TLS.
"""

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_TIMEOUT_S = 4.0


def serving(address: str, ca: str | None) -> bool:
    """Whether the server at `address` answers SERVING in time."""
    if ca is None:
        channel = grpc.insecure_channel(address)
    else:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(Path(ca).read_bytes()))
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    arguments = dict(enumerate(sys.argv[1:]))
    sys.exit(0 if serving(arguments.get(0, _DEFAULT_ADDRESS), arguments.get(1)) else 1)
