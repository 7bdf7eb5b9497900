"""Which tests pytest-xdist's processes run side by side: a file stays together, and so do all files that start Ray.

Two Ray clusters at once would need too much memory and more than two cores. One beside tests that compute is what fills
the time for which it waits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

_RAY = "pytest.mark.ray"


class RayTogether(LoadScopeScheduling):
    """Scopes are files, except for those with the mark `ray`, which are one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _RAY if _starts_ray(Path(self.config.rootpath) / file) else file


@cache
def _starts_ray(file: Path) -> bool:
    return _RAY in file.read_text()
