"""What every line of measurements says about where it comes from."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import __version__, _core
from .kits import Kit


def provenance(kit: Kit, commit: str | None) -> dict[str, Any]:
    """Fields that are the same for all lines of a run; None for what does not apply."""
    return {
        "commit": commit or checkout_commit() or f"flashcute {__version__}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "flashcute": __version__,
        "device": device_name(kit),
        "driver": driver_version() if kit.device == "cuda" else None,
        "cuda": cuda_version(kit),
        "library": f"{kit.library} {kit.version}",
        "cudnn": cudnn_version(kit),
        "python": platform.python_version(),
        "threads": _core.build_info().cpu_threads if kit.device == "cpu" else None,
    }


def checkout_commit() -> str | None:
    """Of the flashcute checkout that is the current folder, "-dirty" if files differ from it."""
    if not Path("python/flashcute/__init__.py").exists():
        return None
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def device_name(kit: Kit) -> str:
    if kit.device == "cuda":
        gpu = _core.driver_info().gpus[0]
        return f"{gpu.name}, sm_{gpu.arch}"
    build = _core.build_info()
    return f"{cpu_model()}, {build.cpu_isa}, {build.cpu_threads} threads"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def driver_version() -> str | None:
    """Like "580.65.06"."""
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def cuda_version(kit: Kit) -> str | None:
    """That the array library was built for."""
    if kit.device == "cuda" and kit.library == "torch":
        cuda = import_module("torch").version.cuda
        return None if cuda is None else str(cuda)
    return None


def cudnn_version(kit: Kit) -> str | None:
    if kit.device == "cuda" and kit.library == "torch":
        version = import_module("torch").backends.cudnn.version()
        return None if version is None else str(version)
    return None


def output_of(*command: str) -> str | None:
    """What a program prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None
