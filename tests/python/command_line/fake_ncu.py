"""An `ncu` that profiles nothing: it notes what it was asked, writes a report, and prints it as the real one does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from flashcute import _core
from flashcute._cli import ncu

FORWARD = "flashcute_sm90_fwd_bf16_d128_m128_n128_w8_st3_full"

# name, unit, value. With separators of thousands and "n/a", as on the raw page; the second instance of a metric in
# brackets.
RAW: list[tuple[str, str, str]] = [
    ("dram__bytes_read.sum", "byte", "201,326,592"),
    ("dram__bytes_write.sum", "byte", "66,060,288"),
    ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "%", "5.25"),
    ("gpu__time_duration.sum", "ns", "800,000"),
    ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "", "1,250"),
    ("l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed", "%", "12.5"),
    ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", "", "50,000"),
    ("l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum", "byte", "0"),
    ("l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum", "byte", "0"),
    ("launch__registers_per_thread", "register/thread", "168"),
    ("launch__shared_mem_per_block", "byte/block", "231,424"),
    ("lts__t_bytes.sum", "byte", "8,931,000,000"),
    ("lts__t_sectors_srcunit_tex.sum", "sector", "141,000,000"),
    ("lts__throughput.avg.pct_of_peak_sustained_elapsed", "%", "41.75 (40.1; 43.4)"),
    ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active", "%", "47.31"),
    ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "%", "94.44"),
    ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "%", "93.9"),
    ("sm__warps_active.avg.pct_of_peak_sustained_active", "%", "n/a"),
    ("smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio", "inst", "3.50"),
    ("smsp__average_warps_issue_stalled_selected_per_issue_active.ratio", "inst", "1.00"),
    ("smsp__average_warps_issue_stalled_not_selected_per_issue_active.ratio", "inst", "4.00"),
    ("smsp__average_warps_issue_stalled_wait_per_issue_active.ratio", "inst", "1.50"),
    ("smsp__issue_active.avg.pct_of_peak_sustained_active", "%", "30.0"),
]

LAUNCH = {
    "Process ID": "4711", "Process Name": "python3.12", "Host Name": "127.0.0.1", "Kernel Name": FORWARD,
    "Context": "1", "Stream": "7", "Block Size": "(384, 1, 1)", "Grid Size": "(132, 1, 1)", "Device": "0", "CC": "9.0",
}  # fmt: skip


def raw_page(kernels: tuple[str, ...] = (FORWARD,)) -> str:
    def row(cells: list[str]) -> str:
        return ",".join(f'"{cell}"' for cell in cells)

    header = row(["ID", *LAUNCH, *(name for name, _, _ in RAW)])
    units = row(["", *("" for _ in LAUNCH), *(unit for _, unit, _ in RAW)])
    rows = [
        row([str(i), *(LAUNCH | {"Kernel Name": name}).values(), *(value for _, _, value in RAW)])
        for i, name in enumerate(kernels)
    ]
    return "\n".join([header, units, *rows]) + "\n"


SCRIPT = """\
#!{python}
import json, os, pathlib, subprocess, sys
folder = pathlib.Path({folder!r})
arguments = sys.argv[1:]
with open(folder / "asked.jsonl", "a") as asked:
    asked.write(json.dumps(arguments) + "\\n")
if "--import" in arguments:
    report = pathlib.Path(arguments[arguments.index("--import") + 1])
    print(report.read_text(), end="")
    sys.exit()
print("==PROF== Connected to process 4711 (/usr/bin/python3.12)")
metrics = arguments[arguments.index("--metrics") + 1].split(",")
for name in json.loads((folder / "unknown.json").read_text()):
    if name in metrics:
        pattern = name.replace(".", "\\\\.")
        print("==ERROR== Failed to find metric regex:^" + pattern + "$")
        sys.exit(1)
failure = (folder / "failure.txt").read_text()
if failure:
    print(failure)
    sys.exit(1)
if (folder / "run").exists():
    subprocess.run(arguments[arguments.index("--export") + 2:], check=True)
report = pathlib.Path(arguments[arguments.index("--export") + 1])
report.write_text((folder / "page.csv").read_text())
print("==PROF== Report: " + str(report))
"""


class FakeNcu:
    """On PATH. `failure`: what it says before it fails; `unknown`: metrics that it does not know; `runs`: whether the
    program is run too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.says(raw_page())
        self.fails("")
        self.lacks()
        program = folder / "ncu"
        program.write_text(SCRIPT.format(python=sys.executable, folder=str(folder)))
        program.chmod(0o755)

    def says(self, page: str) -> None:
        (self.folder / "page.csv").write_text(page)

    def fails(self, message: str) -> None:
        (self.folder / "failure.txt").write_text(message)

    def lacks(self, *metrics: str) -> None:
        (self.folder / "unknown.json").write_text(json.dumps(metrics))

    def runs_the_program(self) -> None:
        (self.folder / "run").touch()

    @property
    def asked(self) -> list[list[str]]:
        file = self.folder / "asked.jsonl"
        return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def value_after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def make_fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNcu:
    """Also where there is no GPU: nothing but `ncu` would need it."""
    folder.mkdir()
    fake = FakeNcu(folder)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    if not _core.driver_info().gpus:
        monkeypatch.setattr(ncu, "require_gpu", lambda: None)
    return fake


Line = dict[str, Any]


def read_lines(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()]
