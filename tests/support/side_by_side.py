"""Which tests pytest-xdist's processes run side by side: a file stays together, and so do all files that start Ray.

Two Ray clusters at once would need too much memory and more than two cores. One beside tests that compute is what fills
the time for which it waits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

_RAY = "pytest.mark.ray"
_LONG = (
    "attention/backends/test_conformance.py",
    "workers/test_windows.py",
    "workers/test_pair.py",
    "workers/models/test_families.py",
    "workers/parallel/test_sharded_model.py",
    "workers/scheduling/test_sequence_blocks.py",
    "workers/runner/test_decode_runner.py",
    "workers/test_faults.py",
    "workers/test_family_pairs.py",
    "workers/sampling/ops/test_sample_tokens.py",
    "cluster/cli/test_doctor.py",
    "cluster/test_families.py",
    "cluster/gateway/test_engine.py",
    "attention/ops/test_triton_ops.py",
)
"""Files that take longest: if they came last, one process would be busy with them while the others are idle."""


def start_early(path: Path) -> int:
    """Where a file stands in the order: those that start Ray first, which all go to one process, then the long ones."""
    if _starts_ray(path):
        return 0
    return 1 if path.as_posix().endswith(_LONG) else 2


class RayTogether(LoadScopeScheduling):
    """Scopes are files, except for those with the mark `ray`, which are one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _RAY if _starts_ray(Path(self.config.rootpath) / file) else file


@cache
def _starts_ray(file: Path) -> bool:
    return _RAY in file.read_text()
