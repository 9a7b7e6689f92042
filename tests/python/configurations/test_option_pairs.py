"""Every pair of options together: the configurations of tests/option_pairs.def, which the C++ suite
runs in emulated thread blocks and these tests on a GPU."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import flashcute as fc
import numpy as np
import oracle
import pytest
from tensors import run_and_check

LIST = Path(__file__).parents[2] / "option_pairs.def"


def python_value(text: str) -> object:
    name = text.rpartition("::")[2]
    return {"true": True, "false": False}.get(name, int(name) if name.isdigit() else name)


def configurations() -> list[tuple[fc.ForwardConfig, bool]]:
    """(configuration, causal) of every line."""
    text = " ".join(re.sub(r"//.*", "", LIST.read_text()).split())
    found = []
    for mask, options in re.findall(r"OPTION_PAIR\((\w+),([^()]*)\)", text):
        values = {k: python_value(v) for k, v in re.findall(r"\.(\w+) = ([\w:]+)", options)}
        found.append((fc.ForwardConfig(**values), mask == "causal"))
    return found


CONFIGURATIONS = configurations()
OPTIONS = [
    name
    for name, member in vars(fc.ForwardConfig).items()
    if isinstance(member, property)
    # Hopper's kernel has options of its own: test_sm90.py
    and name
    not in (
        "name",
        "smem_bytes",
        "kernel",
        "pingpong",
        "overlap",
        "stale_max",
        "scores_ahead",
        "late_store",
        "cluster",
    )
]
Pair = frozenset[tuple[str, object]]


def pairs_of(cfg: fc.ForwardConfig, causal: bool) -> set[Pair]:
    values = [*((name, getattr(cfg, name)) for name in OPTIONS), ("causal", causal)]
    return {frozenset(pair) for pair in itertools.combinations(values, 2)}


def is_legal(cfg: fc.ForwardConfig) -> bool:
    try:
        cfg.check("sm_89")
    except fc.ConfigError:
        return False
    return True


def test_the_options_are_found() -> None:
    """The tests below would pass if they looked at nothing."""
    assert len(OPTIONS) == 18
    assert len(CONFIGURATIONS) > 10
    for cfg, _ in CONFIGURATIONS:
        assert is_legal(cfg), cfg


def test_every_option_takes_every_value() -> None:
    """An option that stays at one value is not tested at all."""
    for name in OPTIONS:
        values = {getattr(cfg, name) for cfg, _ in CONFIGURATIONS}
        assert len(values) > 1, name
        if isinstance(getattr(fc.ForwardConfig(), name), bool):
            assert values == {True, False}, name


def test_no_pair_is_missing() -> None:
    """A pair that a legal configuration of the same values can have, and that none here has."""
    covered = set().union(*(pairs_of(cfg, causal) for cfg, causal in CONFIGURATIONS))
    values = {
        name: sorted({getattr(cfg, name) for cfg, _ in CONFIGURATIONS}, key=str) for name in OPTIONS
    }
    values["causal"] = [False, True]
    rng = np.random.default_rng(0)
    for a, b in itertools.combinations(values, 2):
        for x, y in itertools.product(values[a], values[b]):
            if frozenset([(a, x), (b, y)]) in covered:
                continue
            for _ in range(200):  # at random: some legal configuration, if there is one
                chosen = {name: v[rng.integers(len(v))] for name, v in values.items()}
                chosen |= {a: x, b: y}
                chosen.pop("causal")
                assert not is_legal(fc.ForwardConfig(**chosen)), f"{a}={x} with {b}={y}"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "causal"), CONFIGURATIONS, indirect=["compiled"], ids=lambda x: getattr(x, "name", str(x))
)  # fmt: skip
def test_on_the_gpu(rng: np.random.Generator, compiled: fc.ForwardConfig, causal: bool) -> None:
    """What the emulated thread block cannot see: the compiler, the special-function unit, timing."""
    cfg = compiled
    step = max(1, cfg.copy_bytes // np.dtype("f4" if cfg.dtype == "float32" else "f2").itemsize)
    for sq, sk, narrower in [(300, 450, 0), (129, 65, step), (1, 257, 3 * step)]:
        p = oracle.make_problem(
            rng, cfg.dtype, seqlen_q=sq, seqlen_k=sk, heads=4, kv_heads=2, causal=causal,
            d=cfg.head_dim - narrower, d_v=cfg.head_dim_v - narrower,
        )  # fmt: skip
        run_and_check(p, "cuda", cfg=cfg)
