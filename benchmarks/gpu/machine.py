"""Where a part ran."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[2]


def machine(device: torch.device) -> dict[str, Any]:
    """Device, versions, date, commit and the settings of torch on which products depend."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(_ROOT), "rev-parse", "HEAD"),
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_in_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_in_convolution": torch.backends.cudnn.allow_tf32,
        "bf16_reduced_precision_reduction": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
    }
    if device.type != "cuda":
        return found | {"cpu": _processor(), "threads": torch.get_num_threads()}
    gpu = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": gpu.name,
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _output(program: str, *arguments: str) -> str | None:
    """The first line that a program prints; None if it is not there or fails."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
