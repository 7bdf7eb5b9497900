"""What is wrong with a path, and how to mend it. Judges facts alone; looks at nothing itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kv_transfer.diagnostics.report import PathReport

CUDA_IPC, RDMA, SHARED_MEMORY, TCP = "CUDA IPC", "RDMA", "shared memory", "TCP"
_NAMES = (
    (CUDA_IPC, ("cuda_ipc",)),
    (RDMA, ("rc_", "dc_", "ud_", "rc/", "ib/", "gga", "srd")),
    (TCP, ("tcp",)),
    (SHARED_MEMORY, ("cma", "sysv", "posix", "xpmem", "knem")),
)
_FASTER_THAN_PCIE = 70e9
_ENOUGH = {"same GPU": 0.2, "NVLink": 0.5, "PCIe": 0.4, "host memory": 0.04}
"""What part of the link's own speed a path should reach. Host memory is copied by one thread, in turn with others."""


@dataclass(frozen=True)
class Finding:
    """Something that the reader should know.

    Attributes:
        degraded: whether handoffs suffer from it.
        what: is the matter.
        mend: what to do.
    """

    degraded: bool
    what: str
    mend: str


@dataclass(frozen=True)
class Link:
    """What joins the memory of two processes.

    Attributes:
        kind: "same GPU", "NVLink", "PCIe", "host memory", or "unknown".
        name: for people, such as "NVLink (NV18)".
        bytes_per_s: what it should carry in one direction; 0 when unknown.
    """

    kind: str
    name: str
    bytes_per_s: float


@dataclass(frozen=True)
class CandidateReport:
    """The path between two places.

    Attributes:
        name: such as "GPU 0 → GPU 1".
        link: what joins them.
        path: what was found; None if the check failed.
        failure: why it did.
    """

    name: str
    link: Link
    path: PathReport | None
    failure: str = ""

    @property
    def transport(self) -> str:
        """What carries WRITEs, in one of this module's words where there is one."""
        if self.path is None:
            return "none"
        carrier = self.path.carriers.get("WRITE")
        if carrier is not None:
            return next((name for name, parts in _NAMES if any(part in carrier for part in parts)), carrier)
        on_gpu = self.path.ends[0].device == "cuda"
        return CUDA_IPC if on_gpu and best_rate(self.path) > _FASTER_THAN_PCIE else "unknown"

    @property
    def evidence(self) -> str:
        """How `transport` is known."""
        if self.path is None:
            return ""
        if "WRITE" in self.path.carriers:
            words = (
                f"{operation} {carrier}" for operation, carrier in sorted(self.path.carriers.items(), reverse=True)
            )
            return f"UCX's log: {', '.join(words)}"
        return "UCX's log does not say; judged by the speed"


def best_rate(path: PathReport) -> float:
    """The best bytes a second of WRITEs of any size."""
    return max((rate.bytes_per_s for rate in path.measured.rates if rate.operation == "WRITE"), default=0.0)


def environment_findings(variables: Mapping[str, str], devices: Collection[str], *, on_gpu: bool) -> list[Finding]:
    """What is wrong with UCX's variables.

    Args:
        variables: as the workers will have them.
        devices: network devices of this machine, without ports.
        on_gpu: whether KV cache will lie on GPUs.
    """
    found = []
    tls = variables.get("UCX_TLS")
    if tls is not None and on_gpu and not _allows(tls, "cuda_ipc", ("cuda",)):
        found.append(
            Finding(
                True,
                f"UCX_TLS={tls} excludes cuda_ipc: GPUs cannot write to each other directly",
                "unset UCX_TLS, or add cuda_ipc and cuda_copy to it",
            )
        )
    if tls is not None and not _allows(tls, "tcp", ()):
        found.append(
            Finding(True, f"UCX_TLS={tls} excludes tcp, which NIXL needs for its messages", "add tcp to UCX_TLS")
        )
    names = [name for name in variables.get("UCX_NET_DEVICES", "all").removeprefix("^").split(",") if name != "all"]
    if unknown := [name for name in names if name.partition(":")[0] not in devices]:
        found.append(
            Finding(
                True,
                f"UCX_NET_DEVICES names {', '.join(unknown)}, which this machine does not have",
                f"unset it, or choose of {', '.join(sorted(devices))}",
            )
        )
    return found


def pair_findings(pair: CandidateReport) -> list[Finding]:
    """What is wrong between two places."""
    path = pair.path
    if path is None:
        return [Finding(True, f"{pair.name}: {pair.failure}", "see the lines above; NIXL_LOG_LEVEL=INFO says more")]
    found = [*_end_findings(pair, path), *_transport_findings(pair, path)]
    if not path.data_arrived:
        found.append(
            Finding(True, f"{pair.name}: what was written is not what arrived", "do not serve with this transport")
        )
    found += _speed_findings(pair, path)
    return found


def _allows(tls: str, transport: str, aliases: Sequence[str]) -> bool:
    """Whether a value of UCX_TLS lets a transport be used."""
    names = tls.removeprefix("^").split(",")
    listed = any(name in names for name in (transport, *aliases))
    return not listed if tls.startswith("^") else listed or "all" in names


def _end_findings(pair: CandidateReport, path: PathReport) -> list[Finding]:
    found = []
    if pair.link.kind in ("NVLink", "PCIe") and path.ends[0].device_uuid == path.ends[1].device_uuid:
        what = f"{pair.name}: both processes were given {path.ends[0].device_uuid}"
        found.append(Finding(True, what, "look at CUDA_VISIBLE_DEVICES; this says nothing about the two GPUs"))
    for end in path.ends:
        if end.device == "cuda" and not end.cuda_context:
            found.append(
                Finding(
                    True,
                    f"{pair.name}: the thread that owns the NIXL agent has no CUDA context, so UCX drops NVLink",
                    "report it: Baton makes one before it makes the agent",
                )
            )
        if end.device == "cuda" and "cuda" not in end.ucx_modules:
            found.append(
                Finding(
                    True,
                    f"{pair.name}: NIXL's UCX has not loaded its CUDA module",
                    "install nixl-cu13 (or nixl-cu12 for a CUDA 12 driver) from its wheel, and see that the driver's "
                    "libcuda.so.1 is found",
                )
            )
    return list(dict.fromkeys(found))


def _transport_findings(pair: CandidateReport, path: PathReport) -> list[Finding]:
    if pair.transport == TCP:
        gpu = pair.link.kind != "host memory"
        mend = (
            "look at UCX_TLS; both processes must see the driver's libcuda.so.1, share an IPC namespace (docker "
            "--ipc=host) and be allowed to use CUDA IPC"
            if gpu
            else "let processes read each other's memory: /proc/sys/kernel/yama/ptrace_scope must be 0, or the "
            "container needs CAP_SYS_PTRACE; and share one IPC namespace"
        )
        return [Finding(True, f"{pair.name}: the KV cache goes over TCP", mend)]
    if pair.link.kind != "host memory" and pair.transport == SHARED_MEMORY:
        mend = "look at UCX_TLS, and at `nvidia-smi topo -m` for whether the two GPUs can reach each other"
        return [Finding(True, f"{pair.name}: the KV cache goes through host memory", mend)]
    if pair.transport == "unknown":
        return [Finding(True, f"{pair.name}: nothing says what carries the data", "run with NIXL_LOG_LEVEL=INFO")]
    if pair.link.kind == "PCIe" and pair.transport == CUDA_IPC and best_rate(path) < _FASTER_THAN_PCIE:
        mend = "choose GPUs with NVLink between them, if there are any"
        return [Finding(False, f"{pair.name}: these GPUs have no NVLink between them, data goes over PCIe", mend)]
    return []


def _speed_findings(pair: CandidateReport, path: PathReport) -> list[Finding]:
    """Of WRITEs: handoffs do not read."""
    if best_rate(path) >= pair.link.bytes_per_s * _ENOUGH.get(pair.link.kind, 0.0):
        return []
    what = (
        f"{pair.name}: WRITE reaches {best_rate(path) / 1e9:.1f} GB/s, {pair.link.name} should give "
        f"{pair.link.bytes_per_s / 1e9:.0f}"
    )
    mend = "see that nothing else uses the link, and that clocks are not throttled (nvidia-smi -q -d PERFORMANCE)"
    return [Finding(True, what, mend)]
