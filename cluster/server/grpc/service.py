"""The methods of baton.v1.Baton, and how they are hung into a gRPC server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, closing, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from cluster import caller, trace_context
from cluster.api import Engine, ModelInfo, ServerInfo
from cluster.errors import ShuttingDownError
from cluster.generation.text_generation import Generation, GenerationRequest
from cluster.generation.whole_answer import held_bytes
from cluster.request_id import check_name
from cluster.server.call_gate import CallGate
from cluster.server.grpc.access import host_of
from cluster.server.grpc.connections import GrpcConnections
from cluster.server.grpc.errors import status_of, trailing_metadata_of
from cluster.server.grpc.prompts import add_special_tokens_from_proto, prompt_from_proto
from cluster.server.grpc.responses import ResponseWriter
from cluster.server.grpc.stream_writer import StreamWriter
from cluster.server.held_bytes import HeldBytes
from cluster.server.pacing import Pacer
from cluster.server.unread import UnreadStreams, Writing
from cluster.wire import convert
from cluster.wire.bounds import check_bounds
from cluster.wire.sampling import sampling_from_proto
from protos import baton_pb2
from workers.errors import DeadlineExceededError, InvalidRequestError
from workers.messages import RequestOptions

SERVICE = baton_pb2.DESCRIPTOR.services_by_name["Baton"]
_NO_DEADLINE_S = 1e9
"""gRPC's word for none."""
_NEW_WORK = frozenset({"Generate", "GenerateOnce", "Tokenize", "Scale"})
"""Methods that a server which drains refuses; the others say how it is, and are answered until it stops."""
_ON_THE_WIRE = set(baton_pb2.GenerateRequest.DESCRIPTOR.fields_by_name) - {"request_id", "sampling"}
_OPTIONS = tuple(field.name for field in fields(RequestOptions) if field.name in _ON_THE_WIRE)
"""What a request says on the wire as it does inside; strings have at most `request_id.MAX_NAME_BYTES`."""
ServerInfoSource = Callable[[], ServerInfo]
_Govern = Callable[[grpc.aio.ServicerContext, bytes], AbstractAsyncContextManager["_Governed"]]
_ParseRequest = Callable[[bytes], Awaitable[Any]]
_T = TypeVar("_T")


class BatonService:
    """One method per rpc of the service, of the same name: a parsed request and the seconds left go in.

    One that streams writes its messages, whole as they go on the wire, by what it is given besides.

    Attributes:
        pacer: of the streams.
    """

    def __init__(
        self, generation: Generation, engine: Engine, model_info: ModelInfo, pacer: Pacer, server_info: ServerInfoSource
    ) -> None:
        self._server_info = server_info
        self._generation = generation
        self._engine = engine
        self._model_info = model_info
        self.pacer = pacer

    async def Generate(  # noqa: N802
        self, request: baton_pb2.GenerateRequest, timeout_s: float, out: StreamWriter
    ) -> None:
        """Stream a text as it is generated."""
        request_id = _request_id(request.request_id)
        writer = ResponseWriter(request_id, self._generation.token_text)
        asked = await self._request(request, request_id, timeout_s)
        async with aclosing(await self._generation.start(asked)) as parts:
            out.follow(parts, writer.part)
            async for part in parts:
                await out.write(writer.part(part))
                await self.pacer.turn()

    async def GenerateOnce(  # noqa: N802
        self, request: baton_pb2.GenerateRequest, timeout_s: float
    ) -> baton_pb2.GenerateResponse:
        """Generate a text and return it whole."""
        request_id = _request_id(request.request_id)
        writer = ResponseWriter(request_id, self._generation.token_text)
        asked = await self._request(request, request_id, timeout_s)
        asked = replace(asked, gathered=asked.sampling.n)
        async with aclosing(self._generation.generate(asked)) as chunks:
            gathered = [chunk async for chunk in chunks]
        return await self._generation.intake.call(held_bytes(gathered), writer.whole, gathered)

    async def Tokenize(  # noqa: N802
        self, request: baton_pb2.TokenizeRequest, timeout_s: float
    ) -> baton_pb2.TokenizeResponse:
        """Turn a prompt into token ids."""
        prompt = await self.read(request.ByteSize(), partial(prompt_from_proto, request))
        token_ids = await self._generation.tokenize(prompt, request.model, add_special_tokens_from_proto(request))
        return baton_pb2.TokenizeResponse(token_ids=token_ids.tolist(), max_model_len=self._model_info.max_model_len)

    async def GetModelInfo(  # noqa: N802
        self, request: baton_pb2.GetModelInfoRequest, timeout_s: float
    ) -> baton_pb2.GetModelInfoResponse:
        """Say which model is served."""
        return convert.model_info_to_proto(self._model_info)

    async def GetServerInfo(  # noqa: N802
        self, request: baton_pb2.GetServerInfoRequest, timeout_s: float
    ) -> baton_pb2.GetServerInfoResponse:
        """Say which Baton serves."""
        return baton_pb2.GetServerInfoResponse(**asdict(self._server_info()))

    async def ListWorkers(  # noqa: N802
        self, request: baton_pb2.ListWorkersRequest, timeout_s: float
    ) -> baton_pb2.ListWorkersResponse:
        """List all workers."""
        return baton_pb2.ListWorkersResponse(workers=map(convert.worker_to_proto, self._engine.workers()))

    async def Explain(  # noqa: N802
        self, request: baton_pb2.GenerateRequest, timeout_s: float
    ) -> baton_pb2.ExplainResponse:
        """Say where a request would go."""
        request_id = _request_id(request.request_id)
        asked = await self._request(request, request_id, timeout_s)
        return convert.explanation_to_proto(await self._generation.explain(asked))

    async def Scale(  # noqa: N802
        self, request: baton_pb2.ScaleRequest, timeout_s: float
    ) -> baton_pb2.ScaleResponse:
        """Have pools grow or shrink."""
        return convert.targets_to_proto(self._engine.scale(dict(request.targets)))

    async def read(self, num_bytes: int, work: Callable[[], _T]) -> _T:
        """Do a part of the work on a request of so many bytes, off the event loop if it is large; see `Intake.run`."""
        return await self._generation.intake.run(num_bytes, work)

    async def _request(
        self, request: baton_pb2.GenerateRequest, request_id: str, timeout_s: float
    ) -> GenerationRequest:
        work = partial(_generation_request, request, request_id, timeout_s, self._generation.sampling_defaults)
        return await self.read(request.ByteSize(), work)


@dataclass(frozen=True)
class Terms:
    """On which all calls are answered.

    Attributes:
        default_timeout_s: the deadline of calls that bring none.
        max_timeout_s: of calls that bring a later one.
        gate: what they pass.
        unread: ends streams that nobody reads.
        connections: that calls come over.
        held: what all requests hold.
    """

    default_timeout_s: float
    max_timeout_s: float
    gate: CallGate
    unread: UnreadStreams
    connections: GrpcConnections
    held: HeldBytes


@dataclass(frozen=True)
class _Governed:
    """A call under its deadline, and the seconds left to begin with."""

    timeout_s: float
    writing: Writing


def method_handlers(service: BatonService, terms: Terms) -> grpc.GenericRpcHandler:
    """What a gRPC server needs to answer the service's calls.

    Requests are parsed here and not by gRPC, which would answer a malformed one (text that is not UTF-8) with INTERNAL.

    Args:
        service: the methods.
        terms: of calls.
    """
    handlers = {}
    for method in SERVICE.methods:
        govern = partial(_governed, method=method.name, terms=terms)
        parse = partial(_parse, service.read, getattr(baton_pb2, method.input_type.name))
        answer = getattr(service, method.name)
        if method.server_streaming:
            handlers[method.name] = _stream_handler(parse, answer, govern, service.pacer)
        else:
            handlers[method.name] = _unary_handler(parse, answer, govern)
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


def _unary_handler(
    parse: _ParseRequest, method: Callable[[Any, float], Awaitable[Any]], govern: _Govern
) -> grpc.RpcMethodHandler:
    async def handle(raw: bytes, context: grpc.aio.ServicerContext) -> Any:
        async with govern(context, raw) as call:
            return await method(await parse(raw), call.timeout_s)

    return grpc.unary_unary_rpc_method_handler(handle, response_serializer=_serialize)


def _stream_handler(
    parse: _ParseRequest,
    method: Callable[[Any, float, StreamWriter], Awaitable[None]],
    govern: _Govern,
    pacer: Pacer,
) -> grpc.RpcMethodHandler:
    async def handle(raw: bytes, context: grpc.aio.ServicerContext) -> None:
        async with govern(context, raw) as call:
            with closing(StreamWriter(context, call.writing, pacer)) as out:
                await method(await parse(raw), call.timeout_s, out)

    return grpc.unary_stream_rpc_method_handler(handle)


@asynccontextmanager
async def _governed(
    context: grpc.aio.ServicerContext, raw: bytes, *, method: str, terms: Terms
) -> AsyncIterator[_Governed]:
    """Run a call's body under its deadline, and answer its errors by the table.

    gRPC cancels the task of a call whose client is gone or whose own deadline has passed; that goes through untouched.
    """
    trace_context.accept(context.invocation_metadata() or ())
    host = host_of(context.peer())
    caller.accept(replace(caller.current_caller(), host=host))
    remaining = context.time_remaining()
    timeout_s = terms.default_timeout_s if remaining is None or remaining > _NO_DEADLINE_S else remaining
    timeout_s = min(timeout_s, terms.max_timeout_s)
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            with (
                terms.connections.call(context.peer()),
                terms.held.request(host) as request,
                terms.gate.passage(deadline) if method in _NEW_WORK else nullcontext(),
                terms.unread.stream(deadline) as writing,
            ):
                request.add(len(raw))
                yield _Governed(timeout_s, writing)
    except TimeoutError as error:
        late = deadline.expired()
        await context.abort(*status_of(_passed(deadline, timeout_s, terms, writing) if late else error))
    except Exception as error:
        await context.abort(*status_of(error), trailing_metadata_of(error))


def _passed(deadline: asyncio.Timeout, timeout_s: float, terms: Terms, writing: Writing) -> Exception:
    """Why a call's time is over."""
    if writing.late:
        return DeadlineExceededError(f"the answer was not read for {terms.unread.limit_s:g} s")
    if terms.gate.was_ended(deadline):
        return ShuttingDownError("the service is shutting down: the request was not finished in the time that was left")
    return DeadlineExceededError(f"not finished within the deadline of {timeout_s:.3g} s")


async def _parse(read: Callable[[int, Callable[[], Any]], Awaitable[Any]], request_type: Any, raw: bytes) -> Any:
    return await read(len(raw), partial(_parsed, request_type, raw))


def _parsed(request_type: Any, raw: bytes) -> Any:
    check_bounds(raw, request_type.DESCRIPTOR)
    try:
        return request_type.FromString(raw)
    except (DecodeError, UnicodeDecodeError) as error:
        name = request_type.DESCRIPTOR.full_name
        raise InvalidRequestError(f"not a valid {name}, whose texts must be UTF-8: {error}") from error


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _request_id(given: str) -> str:
    return check_name("request_id", given) or uuid.uuid4().hex


def _generation_request(
    request: baton_pb2.GenerateRequest, request_id: str, timeout_s: float, defaults: Mapping[str, Any]
) -> GenerationRequest:
    options: dict[str, Any] = {name: getattr(request, name) for name in _OPTIONS}
    options.update({name: check_name(name, value) for name, value in options.items() if isinstance(value, str)})
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt_from_proto(request),
        sampling=sampling_from_proto(request.sampling, defaults),
        timeout_s=timeout_s,
        model=request.model,
        add_special_tokens=add_special_tokens_from_proto(request),
        **options,
    )
