"""What the assembler made of the loop of Hopper's gradients, where the order of its instructions is the point.

Of every pass `gradients`: the loop holds all its products and no more; the exponentials stand before the wait for
dP = dO V^T, which hides them; dS and dQ are each made visible to the asynchronous units once; no register above
those that the computing warpgroups claim is named.
"""

from __future__ import annotations

import re

from sass import Function


def problems_of(kernel: str, function: Function) -> list[str]:
    """Sentences; none of a kernel of another kind."""
    match = re.search(r"_sm90_bwd_[a-z0-9]+_d(\d+)_m(\d+)_n(\d+)_.*_gradients", kernel)
    if not match:
        return []
    d, m, n = map(int, match.groups())
    # S and dP sum over columns, dV and dK over queries, dQ over keys: 16 of them in each instruction.
    products = (2 * d + 2 * m + n) // 16
    loops = function.branches_back("HGMMA", products)
    if not loops:
        return [f"no loop with {products} HGMMA"]
    loop = min(loops, key=lambda x: x.length)
    text = [instruction for _, instruction in function.instructions[loop.first : loop.last + 1]]
    problems = []
    if loop.counts["HGMMA"] != products:
        problems.append(f"{loop.counts['HGMMA']} HGMMA in the loop, expected {products}")
    # The first wait for all products is the one for dP.
    waits = [i for i, x in enumerate(text) if re.match(r"WARPGROUP\.DEPBAR\S* gsb0, 0x0", x)]
    exponentials = [i for i, x in enumerate(text) if x.startswith("MUFU.EX2")]
    late = [i for i in exponentials if not waits or i > waits[0]]
    if late or len(exponentials) != m * 64 // 128:
        problems.append(
            f"{len(exponentials) - len(late)} exponentials before the wait for dP and {len(late)} after it, "
            f"expected {m * 64 // 128} and 0"
        )
    if (fences := loop.counts["FENCE"]) != 2:
        problems.append(f"{fences} FENCE in the loop, expected one for dS and one for dQ")
    claimed = [
        int(x.split()[-1], 16)
        for _, x in function.instructions
        if x.startswith("USETMAXREG.TRY_ALLOC")
    ]
    named = max(
        (int(r) for _, x in function.instructions for r in re.findall(r"\bR(\d+)\b", x)), default=0
    )
    if claimed and named >= max(claimed):
        problems.append(f"R{named} is named, and {max(claimed)} registers are claimed")
    return problems
