"""Reads what the compiler made of a kernel: instruction counts, and memory spills inside its loops.

Needs ``cuobjdump`` and ``nvdisasm`` (CUDA toolkit, or the packages ``nvidia-cuda-cuobjdump`` and
``nvidia-cuda-nvdisasm``).

usage: python tools/sass.py IMAGE [--arch sm_80]
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path


def find_tool(name: str) -> str:
    """Path of a CUDA binary utility: environment, PATH, an installed package, the toolkit."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / name
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    found = os.environ.get(name.upper()) or shutil.which(name)
    for candidate in (packages, toolkit):
        if not found and candidate.exists():
            found = str(candidate)
    if not found:
        raise SystemExit(f"{name} not found: pip install nvidia-cuda-{name}, or set {name.upper()}")
    if not os.access(found, os.X_OK):  # wheels unpacked by hand lose the bit
        os.chmod(found, 0o755)
    return found


def product_opcode(kernel: str) -> str:
    """What the products of a kernel are made of: tensor cores (HGMMA: Hopper's) or fused multiply-adds."""
    if "_sm90_" in kernel:
        return "HGMMA"
    return "FFMA" if "cudacore" in kernel else "HMMA"


@dataclass
class Loop:
    """A backward branch and what it encloses."""

    first: int
    last: int
    counts: collections.Counter[str]

    @property
    def length(self) -> int:
        return self.last - self.first + 1


@dataclass
class Function:
    name: str
    arch: str
    instructions: list[tuple[int, str]] = field(
        default_factory=list
    )  # (address, text without predicate)

    def opcodes(self) -> list[str]:
        """The opcode of every instruction, with its modifiers: registers and addresses are left out."""
        return [text.split()[0] for _, text in self.instructions]

    def counts(self, first: int = 0, last: int | None = None) -> collections.Counter[str]:
        """Opcodes of instructions [first, last], with their modifiers cut off."""
        stop = len(self.instructions) if last is None else last + 1
        return collections.Counter(
            text.split()[0].split(".")[0] for _, text in self.instructions[first:stop]
        )

    def loops(self, opcode: str, at_least: int = 8) -> list[Loop]:
        """Outermost loops that hold at least that many instructions of an opcode: the main loops."""
        found = self.branches_back(opcode, at_least)
        return [
            a
            for a in found
            if not any(b is not a and b.first <= a.first and a.last <= b.last for b in found)
        ]

    def branches_back(self, opcode: str, at_least: int) -> list[Loop]:
        """Whatever a backward branch encloses with that many instructions of an opcode: also what is no loop, as code
        behind one that spins until a barrier has passed, and then goes back into it."""
        index = {address: i for i, (address, _) in enumerate(self.instructions)}
        found: list[Loop] = []
        for i, (address, text) in enumerate(self.instructions):
            branch = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", text)
            if not branch:
                continue
            target = int(branch.group(1), 16)
            if target >= address or target not in index:
                continue
            loop = Loop(index[target], i, self.counts(index[target], i))
            if loop.counts[opcode] >= at_least:
                found.append(loop)
        return found


def disassemble(image: Path, arch: str | None = None) -> list[Function]:
    """Every kernel of a cubin or fatbin, per architecture."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(find_tool("nvdisasm")).parent), env.get("PATH", "")])
    command = [
        find_tool("cuobjdump"),
        "--dump-sass",
        *(["--gpu-architecture", arch] if arch else []),
        str(image),
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    functions: list[Function] = []
    current_arch = "?"
    for line in text.splitlines():
        if m := re.match(r"\s*code for (sm_\w+)", line):
            current_arch = m.group(1)
        elif m := re.match(r"\s*Function : (\S+)", line):
            functions.append(Function(m.group(1), current_arch))
        elif (m := re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", line)) and functions:
            instruction = re.sub(r"^@!?U?P[T0-9]+\s+", "", m.group(2))
            functions[-1].instructions.append((int(m.group(1), 16), instruction))
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--arch", help="one architecture of a fatbin, for example sm_80")
    arguments = parser.parse_args()
    for function in disassemble(arguments.image, arguments.arch):
        print(function.arch, function.name, f"{len(function.instructions)} instructions")
        for loop in function.loops(product_opcode(function.name)):
            spills = loop.counts["LDL"] + loop.counts["STL"]
            common = "  ".join(f"{op} {n}" for op, n in loop.counts.most_common(14))
            print(f"  loop of {loop.length}: LDL+STL {spills}; {common}")


if __name__ == "__main__":
    main()
