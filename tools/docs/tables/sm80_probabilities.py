"""Tables of the mma.sync gradients with P in float32 until dS is made, beside those with P in 16 bits."""

from __future__ import annotations

from lines import one, rounded, table, where

FILE = "gpu_sm80_float32_probabilities"
ROUNDED, FLOAT32 = "P rounded before dS", "P in float32 until dS"


def turns() -> str:
    """The time with rounded P over that with P in float32."""
    rows = []
    for head_dim in (128, 256):
        for mask in ("causal", "full"):
            told = []
            for length in (1024, 4096):
                cell = {"head_dim": head_dim, "mask": mask, "seqlen": length}
                ms = one(FILE, run="turns", **cell)["ms"]
                told.append(rounded(ms[ROUNDED] / ms[FLOAT32]))
            rows.append([f"{head_dim} {mask}", *told])
    return table(["head dim, mask", "1k", "4k"], rows, numbers=2)


def errors() -> str:
    """The largest relative error of each gradient over masks, bfloat16: before, and with P in float32."""
    rows = []
    for head_dim in (64, 128, 256):
        for deterministic in (False, True):
            found = where(
                FILE, kind="gradient_errors", head_dim=head_dim, deterministic=deterministic,
                dtype="bfloat16",
            )  # fmt: skip
            told = [
                f"{1e3 * max(x['errors'][P][gradient] for x in found):.2f}"
                for gradient in ("dq", "dk", "dv")
                for P in (ROUNDED, FLOAT32)
            ]
            kind = "deterministic" if deterministic else "default"
            rows.append([f"{head_dim}, {kind}", *told])
    names = [f"{x}{when}" for x in ("dq", "dk", "dv") for when in (", before", "")]
    return table(["head dim (errors in 1e-3)", *names], rows, numbers=6)
