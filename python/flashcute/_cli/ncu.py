"""Nsight Compute: where it is, how it is run, and what it says.

The report is written first and read afterwards (`ncu --import FILE --csv --page raw`), so that what the profiled
program prints does not mix with the numbers. The raw page is a table with one row for each launch: a header, a row of
units, and the values. A value may have separators of thousands, and is "n/a" where the chip has no such counter.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .. import _core
from .options import UsageError

# A counter has other names in some versions or on some chips: the first that is known is taken.
Names = tuple[str, ...]

STALL_SECTION = "WarpStateStats"  # the section that has a metric for each reason why warps wait
STALLED = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
UNKNOWN = re.compile(r"Failed to find metric (?:regex:\^)?([\w\\.]+)")

PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
SECONDS = {
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
}  # fmt: skip

NO_PERMISSION = """\
ncu may not read the GPU's counters (ERR_NVGPUCTRPERM): the driver reserves them for administrators. One of
  - run the command above with sudo, keeping the environment: sudo -E env "PATH=$PATH" ...
  - in a container: start it with --cap-add=SYS_ADMIN
  - for all users, until the driver is loaded anew with other options: write
        options nvidia NVreg_RestrictProfilingToAdminUsers=0
    to /etc/modprobe.d/nvidia-profiling.conf, then reboot (`grep RmProfilingAdminOnly /proc/driver/nvidia/params`
    shows 0). It needs an administrator of the host; cloud providers often do not allow it.
`python -m flashcute bench` measures times without counters."""


class Profiled(NamedTuple):
    """One launch in a report."""

    name: str  # of the kernel
    blocks: int  # of the grid
    threads: int  # of each block
    metrics: dict[str, float]
    """By name, in bytes, seconds, per cent and counts; without what the chip lacks."""


# ---- finding it ------------------------------------------------------------------------------------


def find_ncu() -> str | None:
    """On PATH, in the CUDA toolkit, or in a folder of its own, of which the newest is taken."""
    found = shutil.which("ncu")
    if found:
        return found
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "ncu"
    own = Path("/opt/nvidia/nsight-compute")
    newest = sorted(own.glob("*/ncu"), key=lambda path: version_of(path.parent.name))
    for candidate in (toolkit, *reversed(newest)):
        if os.access(candidate, os.X_OK):
            return str(candidate)
    return None


def version_of(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def require_ncu() -> str:
    found = find_ncu()
    if found is None:
        raise UsageError(
            "ncu (Nsight Compute) was not found on PATH, in $CUDA_HOME/bin, /usr/local/cuda/bin or "
            "/opt/nvidia/nsight-compute. It is part of the CUDA toolkit, and NVIDIA has it as a package of its own "
            "(nsight-compute); put the folder that has `ncu` on PATH. --print shows the command line without it"
        )
    return found


def require_gpu() -> None:
    info = _core.driver_info()
    if not info.gpus:
        problem = info.problem or "the driver reports no GPU"
        raise UsageError(
            f"ncu counts what a GPU does, and there is none: {problem}. `io` without --ncu computes the bytes, "
            "`profile --print` shows the command line for a machine that has one"
        )


# ---- running it ------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What is to be profiled: launches of kernels that a program makes."""

    program: tuple[str, ...]
    kernels: str  # a regular expression for their names
    skipped: int  # how many launches of these kernels pass first
    launches: int  # how many are profiled then
    metrics: tuple[Names, ...]
    stalls: bool = False  # also why warps wait


def command_line(ncu: str, job: Job, report: str, metrics: Sequence[str]) -> list[str]:
    sections = ["--section", STALL_SECTION] if job.stalls else []
    return [
        ncu,
        *("--kernel-name", f"regex:{job.kernels}"),
        *("--launch-skip", str(job.skipped)),
        *("--launch-count", str(job.launches)),
        # Otherwise ncu holds the clock at its base, and times are not those of `bench`.
        *("--clock-control", "none"),
        # Not into the process that compiles a kernel at its first use.
        *("--target-processes", "application-only"),
        *sections,
        *("--metrics", ",".join(metrics)),
        "--force-overwrite",
        *("--export", report),
        *job.program,
    ]


def nsys_line(job: Job, report: str) -> list[str]:
    return ["nsys", "profile", "--trace=cuda", f"--output={report}", *job.program]


def import_line(ncu: str, report: str) -> list[str]:
    return [ncu, "--import", report, "--csv", "--page", "raw", "--print-units", "base"]


def first_names(job: Job) -> list[str]:
    return [names[0] for names in job.metrics]


def profile(ncu: str, job: Job, report: str) -> list[Profiled]:
    """Runs the program under ncu, and reads the report. Prints the command line, which a message may refer to."""
    wanted = {names: names[0] for names in job.metrics}
    while True:
        line = command_line(ncu, job, report, list(wanted.values()))
        print(shlex.join(line), flush=True)
        said, failed = output_of(line)
        unknown = {name.replace("\\", "").rstrip(".") for name in UNKNOWN.findall(said)}
        missing = [names for names, name in wanted.items() if is_among(name, unknown)]
        if not missing:
            break
        # ncu profiles nothing if it does not know one of the metrics.
        for names in missing:
            later = names[names.index(wanted.pop(names)) + 1 :]
            if later:
                wanted[names] = later[0]
    require_success(said, failed)
    line = import_line(ncu, report)
    said, failed = output_of(line)
    require_success(said, failed)
    launches = parse_raw(said)
    if not launches:
        raise UsageError(
            f"ncu profiled no kernel whose name matches {job.kernels!r}. It said:\n{last_lines(said)}"
        )
    return [launch._replace(metrics=by_first_names(launch.metrics, wanted)) for launch in launches]


def is_among(name: str, unknown: set[str]) -> bool:
    """ncu names a metric with or without the suffixes that it was asked for."""
    return name in unknown or any(name.startswith(f"{other}.") for other in unknown)


def by_first_names(metrics: dict[str, float], wanted: dict[Names, str]) -> dict[str, float]:
    renamed = {name: names[0] for names, name in wanted.items()}
    return {renamed.get(name, name): value for name, value in metrics.items()}


def output_of(line: Sequence[str]) -> tuple[str, bool]:
    """What a program says on both streams, and whether it failed."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as problem:
        raise UsageError(f"{line[0]}: {problem}") from None
    return f"{done.stdout}\n{done.stderr}", done.returncode != 0


def require_success(said: str, failed: bool) -> None:
    if "ERR_NVGPUCTRPERM" in said:
        raise UsageError(NO_PERMISSION)
    if "No kernels were profiled" in said:
        raise UsageError(
            "ncu saw no launch of a flashcute kernel: the program ended before, or ran on the CPU. It said:\n"
            + last_lines(said)
        )
    if failed or "==ERROR==" in said:
        raise UsageError(f"ncu failed. It said:\n{last_lines(said)}")


def last_lines(said: str, count: int = 12) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-count:])


# ---- reading what it says --------------------------------------------------------------------------


def parse_raw(text: str) -> list[Profiled]:
    """The launches on the raw page, as CSV; lines before the table are ncu's own messages."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    header, units, *rows = [row for row in csv.reader(lines[start:]) if len(row) > 1]
    launches = []
    for row in rows:
        if len(row) != len(header):
            continue
        values = dict(zip(header, row, strict=True))
        metrics = {}
        for name, unit, value in zip(header, units, row, strict=True):
            number = number_of(value)
            if "__" in name and number is not None:
                metrics[name] = number * scale_of(unit)
        blocks, threads = (product_of(values.get(x, "")) for x in ("Grid Size", "Block Size"))
        launches.append(Profiled(values["Kernel Name"], blocks, threads, metrics))
    return launches


def number_of(text: str) -> float | None:
    """Of "1,234.5", and of "12 (3; 4; 5)", which has the instances too; None for "n/a" and words."""
    try:
        number = float(text.partition("(")[0].strip().replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def scale_of(unit: str) -> float:
    """To bytes and seconds: of "Kbyte/block", "usecond"; 1 for others. ncu's K is 1,000."""
    unit = unit.partition("/")[0].strip().lower()
    if unit in SECONDS:
        return SECONDS[unit]
    return PREFIXES.get(unit.removesuffix("byte"), 1.0) if unit.endswith("byte") else 1.0


def product_of(text: str) -> int:
    """Of "(128, 1, 1)"."""
    return math.prod(int(number) for number in re.findall(r"\d+", text))


def stalls_of(metrics: dict[str, float]) -> dict[str, float]:
    """Warps that wait for each reason, for each instruction that is issued; the longest first."""
    found = {m[1]: value for name, value in metrics.items() if (m := STALLED.fullmatch(name))}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
