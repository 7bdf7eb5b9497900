"""What the service's configuration consists of: sections of settings, each with its default, meaning and rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_type_hints


def _setting(default: Any, doc: str, **rules: Any) -> Any:
    """A field with its description and the rules of `cluster.config.parse.build`."""
    return field(default=default, repr=not rules.get("secret", False), metadata={"doc": doc, **rules})


@dataclass(frozen=True)
class ModelConfig:
    """What is served."""

    path: str | None = _setting(
        None,
        "checkpoint: a local folder, a hub id of Hugging Face, or recall-mla, which comes with Baton; default: recall",
        is_path=True,
    )
    served_name: str | None = _setting(None, "the name clients know it by; default: the last part of the path")
    dtype: str = _setting(
        "auto",
        "auto takes the checkpoint's own, or float16 on a GPU without bfloat16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    max_model_len: int | None = _setting(None, "tokens of prompt and answer together; default: the model's own", low=1)
    without_attention: bool = _setting(
        False, "let NO_ATTENTION serve, whose answers mean nothing: to profile what is beside attention"
    )
    tool_format: str = _setting(
        "auto", "how the model writes tool calls: a format's name, none, or auto: as its chat template does"
    )
    reasoning_format: str = _setting(
        "auto", "how the model marks its reasoning: a format's name, none, or auto: as its chat template does"
    )
    load_format: str = _setting("auto", "dummy gives random weights", choices=("auto", "dummy"))
    generation_config: str = _setting(
        "auto",
        "auto takes what requests leave open of sampling from the checkpoint's generation_config.json",
        choices=("auto", "none"),
    )


@dataclass(frozen=True)
class HttpConfig:
    """The OpenAI HTTP server, beside the gRPC server. What it does not say of access is as there."""

    enabled: bool = _setting(True, "answer OpenAI's HTTP interface, too")
    host: str = _setting("127.0.0.1", "address to listen on; only this machine by default")
    port: int | None = _setting(
        None, "0 takes a free one; default: 8000, or a free one where server.port is 0", low=0, high=65535
    )
    api_keys: tuple[str, ...] | None = _setting(
        None,
        "keys, of which a call must carry one as its bearer token; default: the tokens that may generate",
        secret=True,
    )
    tls_cert: str | None = _setting(
        None, "PEM file with the certificate chain; turns TLS on; default: server.tls_cert", is_path=True
    )
    tls_key: str | None = _setting(None, "PEM file with the certificate's key; default: server.tls_key", is_path=True)
    tls_client_ca: str | None = _setting(
        None,
        "PEM file; clients must show a certificate signed by one of these; default: server.tls_client_ca, where "
        "server.tls_cert is taken too",
        is_path=True,
    )
    cors_origins: tuple[str, ...] | None = _setting(
        None, "origins of web pages that may call, such as https://chat.example; * is any; default: none"
    )
    max_body_mb: float = _setting(32.0, "a request's body is no larger than so many MB (10^6 bytes)", above=0)


@dataclass(frozen=True)
class ServerConfig:
    """The gRPC server."""

    host: str = _setting("127.0.0.1", "address to listen on; only this machine by default")
    port: int = _setting(50051, "0 takes a free one", low=0, high=65535)
    tls_cert: str | None = _setting(None, "PEM file with the certificate chain; turns TLS on", is_path=True)
    tls_key: str | None = _setting(None, "PEM file with the certificate's key", is_path=True)
    tls_client_ca: str | None = _setting(
        None, "PEM file; clients must show a certificate signed by one of these", is_path=True
    )
    auth_token: str | None = _setting(
        None, "bearer token that every call must carry; none runs open", secret=True, not_blank=True
    )
    auth_token_file: str | None = _setting(
        None,
        "file of tokens, one a line, alone or behind its roles (generate, operate); read again when it changes",
        is_path=True,
        not_blank=True,
    )
    default_timeout_s: float = _setting(600.0, "deadline of a call that brings none", above=0)
    max_timeout_s: float = _setting(3600.0, "the latest deadline of a call, whatever it brings", above=0)
    max_queue: int = _setting(256, "requests that may wait; more are refused at once", low=0)
    max_queue_wait_s: float = _setting(
        30.0, "the longest wait before a prompt is computed; who would wait longer is refused at once", above=0
    )
    max_n: int = _setting(64, "samples (n) of one request at most", low=1)
    max_concurrent_rpcs: int | None = _setting(None, "calls in progress at once, of any kind", low=1)
    drain_timeout_s: float = _setting(
        30.0, "a server that is told to stop gives the requests under way so long, and refuses new ones", low=0
    )
    health_interval_s: float = _setting(
        5.0, "readiness is looked at so often; a canary request is sent where no other has shown it", above=0
    )
    health_timeout_s: float = _setting(10.0, "a canary request that is not answered by then has failed", above=0)
    reflection: bool = _setting(True, "let clients such as grpcurl ask for the interface")
    http: HttpConfig = field(default=HttpConfig(), metadata={"is_section": True})


@dataclass(frozen=True)
class PoolConfig:
    """A pool of workers, which are equal unless it has groups.

    A worker's KV cache has `num_blocks` blocks, or as many as fit in `kv_cache_gb`, or what `gpu_memory_utilization`
    leaves of a GPU's memory, or a share of the host's. Of several ranks each has as many blocks, with its share of the
    heads.
    """

    replicas: int = _setting(1, "workers to begin with; `baton scale` changes it", low=0)
    min_replicas: int | None = _setting(
        None, "workers at least, however it is scaled; default: 1, or 0 where replicas is 0", low=0
    )
    max_replicas: int = _setting(64, "workers at most, however it is scaled", low=1, high=4096)
    drain_timeout_s: float = _setting(
        60.0, "a worker that leaves may finish its requests for so long; then other workers go on with them", low=0
    )
    tensor_parallel_size: int = _setting(
        1, "ranks that share the model in a worker, each a process with a device of its own", choices=(1, 2, 4, 8, 16)
    )
    num_cpus: float = _setting(1.0, "CPUs that Ray reserves for each rank of a worker", low=0)
    num_gpus: float | None = _setting(
        None,
        "GPUs that Ray reserves for each rank of a worker; default: on cuda 1, or a part where there are too few",
        low=0,
    )
    resources: Mapping[str, float] | None = _setting(
        None, "Ray resources of your own for each rank, such as decode=1: its nodes are those that offer them", above=0
    )
    labels: Mapping[str, str] | None = _setting(None, "labels that a node must have, such as baton/pool=decode")
    device: str = _setting(
        "auto", "auto, cpu or cuda; auto takes the GPUs that Ray has", choices=("auto", "cpu", "cuda")
    )
    gpu_memory_utilization: float | None = _setting(
        None,
        "share of a GPU's memory for a worker; default: 0.9, or a part of it where workers share",
        above=0,
        high=1,
    )
    threads: int | None = _setting(None, "CPU threads of a worker; default: its share of the cores", low=1)
    attention_backend: str | None = _setting(None, "backend by name, such as FLASHINFER; default: the best that runs")
    enforce_eager: bool = _setting(False, "run the model without CUDA graphs")
    block_size: int | None = _setting(None, "tokens per KV block; default: 64 on cuda, else 16", low=1, high=1024)
    kv_cache_dtype: str = _setting("auto", "auto as the model computes, fp8 for half the size", choices=("auto", "fp8"))
    expert_weights: str = _setting(
        "auto",
        "experts stored in MXFP4: mxfp4 keeps them so, dequantized makes plain weights of them; auto keeps them on "
        "NVIDIA GPUs of SM 9.0 and later for workers that decode",
        choices=("auto", "mxfp4", "dequantized"),
    )
    kv_cache_gb: float | None = _setting(None, "size of a worker's KV cache in GB (10^9 bytes)", above=0)
    num_blocks: int | None = _setting(None, "size of a worker's KV cache in blocks", low=1)
    max_num_seqs: int = _setting(16, "sequences in a batch", low=1)
    max_num_batched_tokens: int = _setting(2048, "tokens computed in one step; longer prompts go in chunks", low=1)
    enable_prefix_caching: bool = _setting(True, "keep KV blocks for prompts that begin with what they hold")
    groups: Mapping[str, PoolConfig] | None = _setting(
        None, "unlike workers in one pool: by group name, the settings that differ from the pool's"
    )

    @property
    def fewest_replicas(self) -> int:
        """Workers at least."""
        return min(1, self.replicas) if self.min_replicas is None else self.min_replicas

    @property
    def asks_for_gpus(self) -> bool:
        """Whether it is to run on GPUs or not at all."""
        return self.device == "cuda" or (self.device == "auto" and bool(self.num_gpus))

    @property
    def waits_for_nodes(self) -> bool:
        """Whether it has nodes of its own kind, which may still come."""
        return bool(self.resources or self.labels)


@dataclass(frozen=True)
class DecodePoolConfig(PoolConfig):
    """The decode pool: as `PoolConfig`, with a larger batch, and smaller chunks of what prompts it computes."""

    max_num_seqs: int = _setting(64, "sequences in a batch", low=1)
    max_num_batched_tokens: int = _setting(
        512, "prompt tokens computed beside a decode step, where router.disaggregation lets it compute any", low=1
    )


@dataclass(frozen=True)
class RouterConfig:
    """Where requests go."""

    disaggregation: str = _setting(
        "always",
        "where prompts are computed: always on a prefill worker, never (each on its decode worker), or auto, "
        "wherever that is predicted to delay requests least",
        choices=("auto", "always", "never"),
    )


@dataclass(frozen=True)
class HandoffConfig:
    """How the KV cache travels."""

    connector: str = _setting("nixl", "local only within one process", choices=("nixl", "local"))
    layers_per_write: int | None = _setting(
        None, "layers that are sent together; auto: by what sending costs and computing hides", low=1
    )
    timeout_s: float = _setting(30.0, "a handoff that is not complete by then has failed", above=0)


@dataclass(frozen=True)
class LivenessConfig:
    """When a worker counts as lost although its process may run. Workers say something every second."""

    silence_s: float = _setting(4.0, "a worker that says nothing for so long is lost", low=2)
    step_timeout_s: float = _setting(
        120.0,
        "a step that takes longer, and longer than margin times what was measured, hangs: its worker is lost",
        above=0,
    )
    start_timeout_s: float = _setting(
        1800.0,
        "a worker's start may take so long, from when its processes run; later ones margin times the longest",
        above=0,
    )
    start_silence_s: float = _setting(
        60.0, "a process that does not answer for so long while it starts is lost", above=0
    )
    margin: float = _setting(10.0, "steps and starts may take so many times what is predicted of them", low=1)


@dataclass(frozen=True)
class AutoscalerConfig:
    """When pools grow and shrink by themselves, between their min_replicas and max_replicas."""

    mode: str = _setting("off", "dry-run says what it would do, and why", choices=("off", "dry-run", "on"))
    ttft_s: float = _setting(1.0, "objective of the prefill pool: 90 % of prompts take no longer there", above=0)
    itl_s: float = _setting(0.05, "objective of the decode pool: mean time between tokens", above=0)
    occupancy: float = _setting(
        0.9, "share of KV blocks or batch that a pool should have taken at most", above=0, high=1
    )
    queue_per_worker: float = _setting(4.0, "requests for each worker that should wait at most", above=0)
    shrink_below: float = _setting(
        0.5, "a pool shrinks when it bears less than this part of what it should bear at most", above=0, high=0.9
    )
    interval_s: float = _setting(5.0, "from one look at the pools to the next", above=0)
    grow_after_s: float = _setting(15.0, "the pressure must have been high for so long", low=0)
    shrink_after_s: float = _setting(300.0, "the pressure must have been low for so long", low=0)
    cooldown_s: float = _setting(30.0, "from one change of a pool to its next", low=0)
    grow_step: int = _setting(2, "workers added at once, at most", low=1)
    shrink_step: int = _setting(1, "workers taken away at once, at most", low=1)
    start_patience_s: float = _setting(
        300.0, "a worker that has not started by then is not waited for: the pool grows and shrinks without it", above=0
    )


@dataclass(frozen=True)
class MetricsConfig:
    """The page that shows the service at work, and its metrics for Prometheus, on an HTTP server of their own."""

    enabled: bool = _setting(True, "count, and serve / and /metrics")
    host: str = _setting("127.0.0.1", "address to listen on; only this machine by default, for there is no token")
    port: int | None = _setting(
        None, "default: the one after server.port, or a free one where that is taken", low=0, high=65535
    )
    names: str = _setting("baton", "vllm publishes under vllm: what vLLM has, too", choices=("baton", "vllm"))
    good_ttft_s: float = _setting(1.0, "a good request has its first token by then", above=0)
    good_itl_s: float = _setting(0.05, "and after that so long between tokens at most, on average", above=0)


@dataclass(frozen=True)
class LoggingConfig:
    """What is logged: by the gateway on its error stream, by workers in files of their own."""

    level: str = _setting("warning", "the lowest that is written", choices=("debug", "info", "warning", "error"))
    format: str = _setting("text", "json: one object a line", choices=("text", "json"))
    requests: bool = _setting(True, "a line for each request at its end: workers, tokens, times, outcome")
    prompts: bool = _setting(False, "prompts are in that line, too; never otherwise")
    folder: str | None = _setting(
        None,
        "of the workers' logs, on their machines: NAME.log; default: logs/ in BATON_CACHE_DIR or ~/.cache/baton",
        is_path=True,
    )


@dataclass(frozen=True)
class TracingConfig:
    """A trace of each request by OpenTelemetry (pip install 'baton[trace]')."""

    enabled: bool = _setting(False, "trace requests, and send the spans to a collector by OTLP over HTTP")
    endpoint: str | None = _setting(
        None, "the collector's; default: OTEL_EXPORTER_OTLP_ENDPOINT, or http://localhost:4318/v1/traces"
    )
    sample: float = _setting(1.0, "share kept of traces that begin here; a client's says it itself", low=0, high=1)
    service_name: str = _setting("baton", "what the collector knows the service by")


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster."""

    address: str | None = _setting(None, "cluster to join, such as auto or HOST:6379; default: start one here")
    namespace: str = _setting("baton", "Ray namespace of the actors")


@dataclass(frozen=True)
class ServiceConfig:
    """Everything that `baton up` can be told, by section."""

    model: ModelConfig = ModelConfig()
    server: ServerConfig = ServerConfig()
    prefill: PoolConfig = PoolConfig()
    decode: DecodePoolConfig = DecodePoolConfig()
    router: RouterConfig = RouterConfig()
    handoff: HandoffConfig = HandoffConfig()
    liveness: LivenessConfig = LivenessConfig()
    autoscaler: AutoscalerConfig = AutoscalerConfig()
    metrics: MetricsConfig = MetricsConfig()
    logging: LoggingConfig = LoggingConfig()
    tracing: TracingConfig = TracingConfig()
    ray: RayConfig = RayConfig()


def settings_of(cls: type[Any]) -> list[Field[Any]]:
    """The settings of a section itself, without those of the sections in it."""
    return [f for f in fields(cls) if not f.metadata.get("is_section")]


def sections_in(cls: type[Any]) -> dict[str, type[Any]]:
    """The sections in a section, by name."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.metadata.get("is_section")}


TOP_SECTIONS: dict[str, type[Any]] = get_type_hints(ServiceConfig)
SECTIONS: dict[str, type[Any]] = {
    name: each
    for top, cls in TOP_SECTIONS.items()
    for name, each in ((top, cls), *((f"{top}.{inner}", each) for inner, each in sections_in(cls).items()))
}
"""All, by what their keys begin with: `server.http` is a section in a section."""
POOLS = ("prefill", "decode")
