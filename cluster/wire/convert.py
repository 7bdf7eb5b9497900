"""Between the wire's messages and Baton's own types. Each pair of functions is its own inverse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields

from cluster.api import Explanation, ModelInfo, PoolTarget, RequestReport, ServerInfo, Usage, WorkerStatus
from cluster.routing.types import CandidateReport
from protos import baton_pb2
from workers.messages import FinishReason, Load
from workers.runner.step_times import StepTimes

_FINISH_REASONS = {
    FinishReason.STOP: baton_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: baton_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: baton_pb2.FINISH_REASON_TOOL_CALLS,
}
_FINISH_REASONS_BACK = {number: reason for reason, number in _FINISH_REASONS.items()}
_REPORT_FIELDS = [field.name for field in fields(RequestReport)]
_PAIR_FIELDS = [field.name for field in fields(CandidateReport)]
_LOAD_FIELDS = [field.name for field in fields(Load)]


def finish_reason_to_proto(reason: FinishReason | None) -> baton_pb2.FinishReason:
    """None, still running, is UNSPECIFIED."""
    return baton_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_REASONS[reason]


def finish_reason_from_proto(number: int) -> FinishReason | None:
    """UNSPECIFIED is None, still running."""
    return _FINISH_REASONS_BACK.get(number)  # type: ignore[call-overload,no-any-return]


def stop_reason_to_proto(reason: str | int | None) -> baton_pb2.StopReason | None:
    """None is None: nothing of the request's own ended the text."""
    if reason is None:
        return None
    return baton_pb2.StopReason(stop=reason) if isinstance(reason, str) else baton_pb2.StopReason(stop_token_id=reason)


def stop_reason_from_proto(message: baton_pb2.StopReason) -> str | int | None:
    """An empty message is None."""
    which = message.WhichOneof("reason")
    return None if which is None else getattr(message, which)


def usage_to_proto(usage: Usage) -> baton_pb2.Usage:
    """Token counts."""
    return baton_pb2.Usage(**asdict(usage))


def usage_from_proto(message: baton_pb2.Usage) -> Usage:
    """Token counts."""
    return Usage(prompt_tokens=message.prompt_tokens, completion_tokens=message.completion_tokens)


def report_to_proto(report: RequestReport) -> baton_pb2.Timings:
    """Timings and workers of a request."""
    return baton_pb2.Timings(hidden_fraction=report.hidden_fraction, **asdict(report))


def report_from_proto(message: baton_pb2.Timings) -> RequestReport:
    """Timings and workers of a request."""
    return RequestReport(**{name: getattr(message, name) for name in _REPORT_FIELDS})


def worker_to_proto(worker: WorkerStatus) -> baton_pb2.WorkerStatus:
    """One worker's status."""
    plain = {field.name: getattr(worker, field.name) for field in fields(worker) if field.name != "step_times"}
    values = {**plain, "load": asdict(worker.load), "capability": _step_times_to_proto(worker.step_times)}
    return baton_pb2.WorkerStatus(**values)


def _step_times_to_proto(step_times: StepTimes) -> baton_pb2.Capability | None:
    """None where nothing was measured."""
    if step_times == StepTimes():
        return None
    times = {
        name: [baton_pb2.MeasuredTime(size=size, seconds=seconds) for size, seconds in points]
        for name, points in (("prefill", step_times.prefill), ("decode", step_times.decode))
    }
    return baton_pb2.Capability(**times, kv_token_s=step_times.kv_token_s)


def _step_times_from_proto(message: baton_pb2.Capability) -> StepTimes:
    prefill, decode = (tuple((t.size, t.seconds) for t in times) for times in (message.prefill, message.decode))
    return StepTimes(prefill, decode, message.kv_token_s)


def workers_from_proto(messages: Iterable[baton_pb2.WorkerStatus]) -> list[WorkerStatus]:
    """Workers' status, in order."""
    return [
        WorkerStatus(
            engine_id=m.engine_id,
            role=m.role,
            state=m.state,
            device=m.device,
            attention_backend=m.attention_backend,
            block_size=m.block_size,
            load=Load(**{name: getattr(m.load, name) for name in _LOAD_FIELDS}),
            group=m.group,
            max_num_seqs=m.max_num_seqs,
            step_times=_step_times_from_proto(m.capability),
        )
        for m in messages
    ]


def explanation_to_proto(explanation: Explanation) -> baton_pb2.ExplainResponse:
    """Where a request would go."""
    return baton_pb2.ExplainResponse(**asdict(explanation))


def explanation_from_proto(message: baton_pb2.ExplainResponse) -> Explanation:
    """Where a request would go."""
    pairs = (
        CandidateReport(**{name: getattr(pair, name) for name in _PAIR_FIELDS} | {"prefill": pair.prefill or None})
        for pair in message.pairs
    )
    return Explanation(message.prompt_tokens, message.max_tokens, tuple(pairs))


def targets_to_proto(targets: Iterable[PoolTarget]) -> baton_pb2.ScaleResponse:
    """What the pools are to have."""
    return baton_pb2.ScaleResponse(pools=[baton_pb2.PoolTarget(**asdict(target)) for target in targets])


def targets_from_proto(message: baton_pb2.ScaleResponse) -> list[PoolTarget]:
    """What the pools are to have."""
    return [PoolTarget(m.role, m.target, m.min_replicas, m.max_replicas, m.group) for m in message.pools]


def server_info_from_proto(message: baton_pb2.GetServerInfoResponse) -> ServerInfo:
    """From the wire."""
    return ServerInfo(message.version, message.commit, message.uptime_s)


def model_info_to_proto(info: ModelInfo) -> baton_pb2.GetModelInfoResponse:
    """The served model."""
    return baton_pb2.GetModelInfoResponse(**asdict(info))


def model_info_from_proto(message: baton_pb2.GetModelInfoResponse) -> ModelInfo:
    """The served model."""
    return ModelInfo(
        name=message.name,
        architecture=message.architecture,
        dtype=message.dtype,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
    )
