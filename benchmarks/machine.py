"""What results are made on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

__all__ = ["cpu_model", "machine_info"]


def cpu_model() -> str:
    import cpuinfo

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def machine_info(threads: int) -> dict[str, Any]:
    """CPU, threads, versions and load; nothing that names the host."""
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }
