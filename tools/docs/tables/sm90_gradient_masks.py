"""Tables of Hopper's gradients under windows, lengths, packed sequences and maps: times beside the mma.sync kernels and
beside each other, what was predicted of them, and errors."""

from __future__ import annotations

from lines import link, one, rounded, table, where

from tables.sm90_backward import HEAD_DIMS

FILE = "gpu_sm90_gradient_masks"
CAUSAL, FULL = "causal 4 x 4096", "full 4 x 4096"
WINDOW = "causal window of 4096, 32k"
PACKED = "24 log-normal lengths of 16k, packed"
MAP = "24 log-normal lengths of 16k, a map"
CASES = {
    WINDOW: "causal, a window of 4,096; 32k tokens",
    CAUSAL: "causal, a batch of 4 x 4,096",
    f"{CAUSAL}, as a band": "the same with `seqlens_k`, which hide nothing: a band",
    f"{CAUSAL}, packed": "the same sequences packed",
    FULL: "no mask, a batch of 4 x 4,096",
    f"{FULL}, as a band": "the same with `seqlens_k`: a band",
    f"{FULL}, packed": "the same sequences packed",
    PACKED: "causal, 24 log-normal lengths packed, 16k tokens",
    MAP: "the same as documents of a map",
}


def ms(head_dim: int, case: str, kernel: str = "sm90") -> float:
    return float(one(FILE, kind="gradient_masks", head_dim=head_dim, case=case)[f"ms_{kernel}"])


def over_sm80(head_dim: int, case: str) -> float:
    return ms(head_dim, case, "sm80") / ms(head_dim, case)


def times() -> str:
    """Milliseconds, and the time of the mma.sync kernels over them."""
    rows = []
    for case, words in CASES.items():
        told = [words]
        for d in HEAD_DIMS:
            told += [
                f"{ms(d, case):.2f}",
                f"{ms(d, case, 'sm80'):.2f}",
                rounded(over_sm80(d, case)),
            ]
        rows.append(told)
    header = [x for d in HEAD_DIMS for x in (f"d {d}: ours, ms", "mma.sync, ms", "speed-up")]
    return table(["mask", *header], rows, numbers=len(header))


def summary() -> str:
    """What windows, lengths, packed sequences and maps bring, beside the two masks that had the kernels before."""
    found = [over_sm80(d, case) for case in CASES if case not in (CAUSAL, FULL) for d in HEAD_DIMS]
    plain = [over_sm80(d, case) for case in (CAUSAL, FULL) for d in HEAD_DIMS]
    return (
        f"Under windows, lengths, packed sequences and maps they are {rounded(min(found))} to {rounded(max(found))} "
        f"times as fast as the mma.sync kernels;\nthe batches under the causal mask and without one, for comparison, "
        f"{rounded(min(plain))} to {rounded(max(plain))} times\n({link('lines', FILE)})."
    )


def predictions() -> str:
    """Ratios of times, and whether they are within what was predicted, to two decimals."""

    def of_ours(case: str, base: str) -> list[float]:
        return [ms(d, case) / ms(d, base) for d in HEAD_DIMS]

    rows = []
    for what, low, high, found in (
        ("the causal mask as a band: over the causal kernel", 1.0, 1.01, of_ours(f"{CAUSAL}, as a band", CAUSAL)),
        ("lengths that hide nothing: over the kernel without a mask", None, None, of_ours(f"{FULL}, as a band", FULL)),
        ("four causal sequences packed: over the batch", 1.0, 1.02, of_ours(f"{CAUSAL}, packed", CAUSAL)),
        ("the same without a mask", 1.0, 1.02, of_ours(f"{FULL}, packed", FULL)),
        ("a window of 4,096 at 32k: time of mma.sync over ours", 1.8, 2.1, [over_sm80(d, WINDOW) for d in HEAD_DIMS]),
        ("documents as a map: over the same sequences packed", 1.05, 1.2, of_ours(MAP, PACKED)),
    ):  # fmt: skip
        if low is None or high is None:
            predicted, verdict = "-", "-"
        else:
            predicted = f"{low:.2f} to {high:.2f}"
            failed = [
                f"d {d}"
                for d, x in zip(HEAD_DIMS, found, strict=True)
                if not low <= round(x, 2) <= high
            ]
            verdict = f"wrong at {' and '.join(failed)}" if failed else "right"
        rows.append([what, predicted, *(f"{x:.3f}" for x in found), verdict])
    header = ["", "predicted", *(f"d {d}" for d in HEAD_DIMS)]
    return table([*header, "prediction"], rows)


def errors() -> str:
    """The largest relative error (L2) beside float64 of each group of checks."""
    rows = [
        [x["checks"], str(x["cases"]), f"{x['rel_l2']:.1e}"]
        for x in where(FILE, kind="gradient_masks_error")
    ]
    return table(["checks", "cases", "largest relative error (L2)"], rows, numbers=2)
