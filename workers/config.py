"""How one worker is set up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerConfig:
    """Everything that a worker needs to know of the configuration.

    Attributes:
        name: in status and logs, such as "prefill-0".
        role: "prefill" or "decode".
        model: checkpoint folder.
        dtype: auto, float32, bfloat16 or float16.
        load_format: auto reads the weights; dummy makes random ones.
        device: "cpu" or "cuda".
        tensor_parallel_size: ranks that share the model, each a process with a device of its own.
        threads: CPU threads for torch; None leaves torch's default.
        attention_backend: by name; None chooses.
        block_size: tokens in a KV block.
        num_blocks: of the KV cache; None derives it from `kv_cache_bytes`, or else from the free memory.
        kv_cache_bytes: size of the KV cache; None derives it from the free memory.
        kv_cache_dtype: auto (as the activations) or fp8.
        expert_weights: of experts that a checkpoint holds in MXFP4: auto, mxfp4 (kept so) or dequantized.
        gpu_memory_utilization: the share of a GPU's whole memory that this worker may use, all it holds there included.
        host_memory_share: the share of the host's memory that the KV cache takes on a CPU where no size is given.
        enforce_eager: run the model without CUDA graphs.
        attention_measurements: file of measured attention backends; None: the choice follows their priority.
        max_model_len: tokens of prompt and output together; None takes the model's own, or what the KV cache holds if
            that is less.
        max_num_seqs: sequences in one batch.
        max_num_batched_tokens: token budget of one prefill step, on a decode worker too: what it computes of prompts
            beside a decode step.
        local_prefill: of a decode worker: compute the prompts that come without a prefill worker.
        layers_per_write: layers that one WRITE carries; None chooses for every prompt and path.
        enable_prefix_caching: keep blocks for prompts that begin alike.
        handoff_timeout_s: a handoff that takes longer than this after prefill has ended has failed.
        log_folder: where a process of its own has its log, named after it; None: it has none.
        log_level: the lowest that is written there: debug, info, warning or error.
        log_format: text or json.
    """

    name: str
    role: str
    model: str
    dtype: str = "auto"
    load_format: str = "auto"
    device: str = "cpu"
    tensor_parallel_size: int = 1
    threads: int | None = None
    attention_backend: str | None = None
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    expert_weights: str = "auto"
    gpu_memory_utilization: float = 0.9
    host_memory_share: float = 0.1
    enforce_eager: bool = False
    attention_measurements: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    local_prefill: bool = False
    layers_per_write: int | None = None
    enable_prefix_caching: bool = True
    handoff_timeout_s: float = 30.0
    log_folder: str | None = None
    log_level: str = "warning"
    log_format: str = "text"
