"""Server reflection, as its v1 and its v1alpha, which older tools speak.

The two differ in the name of their package alone. grpcio-reflection has v1alpha; v1's descriptor is made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1ALPHA = reflection.SERVICE_NAME
V1 = V1ALPHA.replace(".v1alpha.", ".v1.")


def enable_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Have a server tell of these services, by their full names, and of reflection itself."""
    _add_v1_descriptor(descriptor_pool.Default())
    servicer = reflection.aio.ReflectionServicer([*services, V1, V1ALPHA])
    # Messages of both versions are the same bytes.
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in (V1, V1ALPHA))
    )


def _add_v1_descriptor(pool: Any) -> None:
    """Enter v1 into a pool of descriptors, where nobody has done so."""
    try:
        pool.FindServiceByName(V1)
        return
    except KeyError:
        pass
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = (text.replace("v1alpha", "v1") for text in (file.name, file.package))
    for message in file.message_type:
        for field in _fields(message):
            if field.type_name:
                field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
            method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
    pool.AddSerializedFile(file.SerializeToString())


def _fields(message: Any) -> Iterator[Any]:
    yield from message.field
    for nested in message.nested_type:
        yield from _fields(nested)
