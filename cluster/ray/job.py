"""Where the actors' processes look for Baton's modules."""

from __future__ import annotations

import site
from pathlib import Path
from typing import Any

from ray.job_config import JobConfig

_ROOT = Path(__file__).resolve().parents[2]


class OwnModulesOnly(JobConfig):
    """Actors find Baton where this process has found it, and never look into the working directory.

    Ray puts the directory that a program was started in at the head of every worker's `sys.path`. A folder there that
    is called `workers` or `attention` would be taken for Baton's.
    """

    def _serialize(self) -> Any:
        self._py_driver_sys_path = module_folders()
        return super()._serialize()


def module_folders() -> list[str]:
    """What goes to the head of the actors' `sys.path`: the folder of a checkout, nothing for what is installed."""
    installed = {Path(folder).resolve() for folder in [*site.getsitepackages(), site.getusersitepackages()]}
    return [] if _ROOT in installed else [str(_ROOT)]
