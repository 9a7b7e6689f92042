"""The gate of the loop of Hopper's gradients must see what it is there for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
KERNEL = "flashcute_sm90_bwd_bf16_d128_m64_n128_w8_st3_gradients_full"

Code = list[str]


def problems_of(code: Code, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.syspath_prepend(str(TOOLS))
    from gradient_schedule import problems_of as found
    from sass import Function

    return found(KERNEL, Function(KERNEL, "sm_90a", [(16 * i, x) for i, x in enumerate(code)]))


def good() -> Code:
    """A loop like the compiler's: a branch leaves it to spin, and comes back."""
    product = "HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR20].tnspB, R24"
    return [
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR47+0x34538], R11",  # the loop begins
        "BRA 0x0",
        *[product] * 16,
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        *["MUFU.EX2 R231, R11"] * 32,
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "STSM.16.MT88.4 [R20+0x24000], R184",
        "FENCE.VIEW.ASYNC.S",
        *[product] * 16,
        "STS.128 [R13+0x2c000], R152",
        "FENCE.VIEW.ASYNC.S",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "BRA 0x10",  # the loop ends
        *[product] * 8,  # the last dQ
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR47+0x34538], R11",
        "BRA 0x30",
    ]


def test_a_good_loop_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that refuses everything."""
    assert problems_of(good(), monkeypatch) == []


def without(text: str) -> Callable[[Code], None]:
    return lambda code: code.remove(next(x for x in code if x.startswith(text)))


def with_a_late_exponential(code: Code) -> None:
    code.remove("MUFU.EX2 R231, R11")
    code.insert(code.index("STSM.16.MT88.4 [R20+0x24000], R184"), "MUFU.EX2 R231, R11")


def with_too_high_a_register(code: Code) -> None:
    code[code.index("MUFU.EX2 R231, R11")] = "MUFU.EX2 R232, R11"


def with_another_product(code: Code) -> None:
    code.insert(3, code[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_late_exponential, "31 exponentials before the wait for dP and 1 after it"),
        (without("MUFU"), "31 exponentials"),
        (without("FENCE"), "1 FENCE in the loop"),
        (with_too_high_a_register, "R232 is named, and 232 registers are claimed"),
        (with_another_product, "33 HGMMA in the loop, expected 32"),
        (without("HGMMA"), "HGMMA in the loop, expected 32"),
    ],
)
def test_a_bad_loop_is_told(
    change: Callable[[Code], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that lost its order, and only a benchmark would show it."""
    code = good()
    change(code)
    assert any(message in x for x in problems_of(code, monkeypatch)), problems_of(code, monkeypatch)
