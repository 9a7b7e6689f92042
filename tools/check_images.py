"""Gates for the kernel images that CMake built, without a GPU.

For every kernel of every family and every target architecture: it is there; its main loops, or all
of it where it multiplies nothing, hold no memory spill (LDL, STL), or no more than what was measured
to pay; the instructions meant are present (of Hopper's products with their width); Hopper's gradients
keep the order of their loop (gradient_schedule.py); registers, stack and shared memory are no worse
than in the checked table tests/images.json, which also holds the number of instructions and a hash of
the sequence of opcodes.
``--same`` asks for the same opcodes too: for a change that is to change no kernel. ``--update`` rewrites
the table.

usage: python tools/check_images.py --images build/*/images [--same | --update]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

from gradient_schedule import problems_of as problems_of_schedule
from sass import Function, disassemble, find_tool, product_opcode

TABLE = Path(__file__).parent.parent / "tests" / "images.json"
MEANT = {
    "HMMA": ("LDGSTS", "LDSM", "HMMA"),  # cp.async, ldmatrix, mma.sync
    "FFMA": ("LDGSTS", "LDS", "FFMA"),  # CUDA cores
    "HGMMA": ("UTMALDG", "SYNCS", "HGMMA", "USETMAXREG"),  # TMA, mbarrier, WGMMA, setmaxnreg
}
# Of a tile -> spills in one iteration of its main loop, of 900 to 4,300 instructions. They are faster than the tiles
# without (docs/kernels/sm80_forward_notebook.md, sm80_backward_notebook.md).
SPILLS_ALLOWED = {
    "d128_m128_n64_w4": 13,
    "d128_m128_n64_w4_band": 15,  # a row's first key beside its last
    "d128_m128_n64_w4_st2_band": 16,
    "d256_m128_n64_w8_st2_noturns_mapped": 36,  # of the warps that load and scout, which have 24 registers
    "d128_m128_n64_w4_st2": 7,
    # Under a map: which block comes next, beside everything else. Of the backward more where P and dS are in registers
    # too. (Up to 4 of each of the mma.sync gradients above head dimension 64 are P in float32: their errors and times,
    # docs/kernels/sm80_backward.md.)
    "d64_m128_n64_w4_st2_qreg_mapped": 5,
    "d128_m128_n64_w4_mapped": 29,
    "d128_m128_n64_w4_st2_mapped": 27,
    "d256_m64_n64_w4_tau0_mapped": 2,
    "bwd_d64_m64_n128_w4_gradients_mapped": 481,
    "bwd_d128_m64_n64_w4_c2_k1_gradients_mapped": 92,
    "bwd_d128_m64_n64_w4_c2_st1_k1_gradients_mapped": 57,
    "bwd_d256_m64_n64_w8_c4_b1_k1_gradients_mapped": 25,
    "bwd_d256_m64_n64_w8_c4_b1_st1_k1_gradients_mapped": 14,
    "bwd_d64_m128_n128_w8_st3_kst2_gradients_mapped": 80,  # most in the warps that load and add
    "bwd_d128_m64_n128_w8_st3_earlyreads_gradients_mapped": 48,
    # Beside an order of additions: where K and V lie, and a block's place in it.
    "bwd_d64_m128_n128_w8_st3_deterministic_gradients": 10,
    "bwd_d128_m64_n128_w8_st3_earlyreads_deterministic_gradients": 4,
    "d64_m128_n32_w4_tf32x3": 8,
    "d128_m64_n32_w4_tf32x3": 14,
    "bwd_d64_m64_n128_w4_gradients": 268,
    "bwd_d128_m64_n64_w4_c2_k1_gradients": 69,
    "bwd_d128_m64_n64_w4_c2_st1_k1_gradients": 111,
    "bwd_d256_m64_n64_w8_c4_b1_k1_gradients": 41,
    "bwd_d256_m64_n64_w8_c4_b1_st1_k1_gradients": 55,
}
WITHOUT_PRODUCTS = (
    "_prepare",
    "_prepare_band",
    "_finish",
    "_finish_band",
    "_sink_band",
    "_sink_mapped",
    "_make_block_map",
)  # passes of the backward, and what makes maps
Resources = dict[str, int]
Facts = dict[str, int | str]  # resources, and what a kernel is made of


def tile_of(kernel: str) -> str:
    """What SPILLS_ALLOWED calls a kernel: "d128_m128_n64_w4" or "bwd_d64_m64_n128_w4_gradients"."""
    match = re.fullmatch(r"flashcute_sm[89]0_(fwd|bwd)_[a-z0-9]+_(.*?)(_full|_causal)?", kernel)
    if not match:
        return kernel.removeprefix("flashcute_")
    return match[2] if match[1] == "fwd" else f"bwd_{match[2]}"


def resources(image: Path) -> dict[tuple[str, str], Resources]:
    """(kernel, arch) -> registers, stack and static shared memory in bytes."""
    command = [find_tool("cuobjdump"), "--dump-resource-usage", str(image)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, str], Resources] = {}
    arch = kernel = "?"
    for line in text.splitlines():
        if m := re.search(r"arch = (sm_\w+)", line):
            arch = m.group(1)
        elif m := re.search(r"Function (\w+):", line):
            kernel = m.group(1)
        elif m := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, m.groups())
            found[kernel, arch] = {"registers": registers, "stack": stack, "shared": shared}
    return found


def code_facts(function: Function) -> Facts:
    """The number of instructions, and a hash that changes if an opcode, a modifier or their order does."""
    opcodes = function.opcodes()
    digest = hashlib.sha256("\n".join(opcodes).encode()).hexdigest()
    return {"instructions": len(opcodes), "opcodes": digest[:16]}


def kernels_of(unit: Path) -> list[str]:
    """The entry points that a generated translation unit defines."""
    return re.findall(r"^FLASHCUTE_\w+_ENTRY\((\w+)[,)]", unit.read_text(), re.MULTILINE)


def products_meant(kernel: str) -> list[str]:
    """Of a Hopper kernel: the instructions of S = Q K^T and O += P V, or of S^T = K Q^T and dV += P^T dO, each with its
    whole width."""
    if match := re.search(r"_sm90_bwd_[a-z0-9]+_d(\d+)_m(\d+)_.*_gradients", kernel):
        d, m = match.groups()
        return [f"HGMMA.64x{m}x16", f"HGMMA.64x{d}x16"]
    match = re.search(r"_sm90_fwd_[a-z0-9]+_d(\d+)(?:_dv(\d+))?_m\d+_n(\d+)_", kernel)
    if not match:
        return []
    d, d_v, n = match.groups()
    return [f"HGMMA.64x{n}x16", f"HGMMA.64x{d_v or d}x16"]


def check_family(unit: Path, archs: list[str]) -> tuple[list[str], dict[str, dict[str, Facts]]]:
    """Problems, and kernel -> arch -> facts."""
    image = unit.with_suffix(".fatbin")
    functions = {(f.name, f.arch): f for f in disassemble(image)}
    used = resources(image)
    problems: list[str] = []
    table: dict[str, dict[str, Facts]] = {}
    for kernel in kernels_of(unit):
        # Built for plain sm_90, Hopper's instructions would be a trap.
        for arch in ["sm_90a"] if "_sm90_" in kernel else archs:
            where = f"{kernel} for {arch}"
            function = functions.get((kernel, arch))
            if function is None:
                problems.append(f"{where}: missing from {image.name}")
                continue
            counts = function.counts()
            if kernel.endswith(WITHOUT_PRODUCTS):
                checked = [("all of it", counts)]
            else:
                product = product_opcode(kernel)
                problems += [f"{where}: no {op} in it" for op in MEANT[product] if not counts[op]]
                text = " ".join(instruction for _, instruction in function.instructions)
                problems += [
                    f"{where}: no {op} in it" for op in products_meant(kernel) if op not in text
                ]
                problems += [f"{where}: {x}" for x in problems_of_schedule(kernel, function)]
                loops = function.loops(product)
                if not loops:
                    problems.append(f"{where}: no loop with {product} was found")
                checked = [(f"a main loop of {loop.length}", loop.counts) for loop in loops]
            tile = tile_of(kernel)
            allowed = SPILLS_ALLOWED.get(tile, SPILLS_ALLOWED.get(tile.removesuffix("_band"), 0))
            for what, found in checked:
                spills = found["LDL"] + found["STL"]
                if spills > allowed:
                    problems.append(f"{where}: {spills} LDL/STL in {what}")
            table.setdefault(kernel, {})[arch] = {**used[kernel, arch], **code_facts(function)}
    return problems, table


def compare(
    table: dict[str, dict[str, Facts]], checked: dict[str, dict[str, Facts]], same: bool
) -> list[str]:
    """What is worse than in the checked table; with `same`, also what is made of other opcodes."""
    problems = []
    for kernel, by_arch in table.items():
        for arch, now in by_arch.items():
            before = checked.get(kernel, {}).get(arch)
            if before is None:
                problems.append(f"{kernel} for {arch}: not in {TABLE.name}; run with --update")
                continue
            problems += [
                f"{kernel} for {arch}: {what} {now[what]}, was {before[what]}"
                for what in ("registers", "stack", "shared")
                if now[what] > before[what]
            ]
            if same and now["opcodes"] != before["opcodes"]:
                counts = f"{now['instructions']} instructions, were {before['instructions']}"
                problems.append(f"{kernel} for {arch}: other opcodes ({counts})")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of *.cu and *.fatbin")
    parser.add_argument("--archs", default="sm_80,sm_90,sm_100,sm_120")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--same", action="store_true", help="no kernel may have other opcodes")
    mode.add_argument("--update", action="store_true", help=f"rewrite {TABLE.name}")
    arguments = parser.parse_args()
    units = sorted(arguments.images.glob("*.cu"))
    if not units:
        sys.exit(f"no images in {arguments.images}")
    problems: list[str] = []
    table: dict[str, dict[str, Facts]] = {}
    for unit in units:
        found, used = check_family(unit, arguments.archs.split(","))
        problems += found
        table |= used
    if arguments.update:
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    else:
        problems += compare(table, json.loads(TABLE.read_text()), arguments.same)
    for kernel, by_arch in sorted(table.items()):
        print(kernel, *(f"{a} {r['registers']}r/{r['stack']}B" for a, r in by_arch.items()))
    print("\n".join(problems) or f"{len(table)} kernels in {len(units)} images pass")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
