"""A small attention and its gradients on a device, by the accuracy rule."""

from __future__ import annotations

from .. import backward, default_backward_config, default_config, forward, reference
from .kits import Kit
from .problem import Case, Given, Result, complaint, errors, fp64_reference, naive_result


def self_test(kit: Kit, dtype: str) -> str:
    """What is wrong, or an empty string."""
    case = Case(2, 4, 2, 100, 150, 64, True, dtype)
    q, k, v = case.random_inputs(kit)
    dout = kit.normal(q.shape, dtype)
    out, lse = forward(
        default_config(case.head_dim, dtype, kit.arch), q, k, v, causal=True, return_lse=True
    )
    given = Given(q, k, v, causal=True)
    ref = fp64_reference(kit, given)
    naive = errors(naive_result(kit, given), ref)
    found = errors(Result(kit.to_numpy(kit.double(out)), kit.to_numpy(lse)), ref)
    wrong = {"attention": complaint(found, naive, ref, dtype)}

    cfg = default_backward_config(case.head_dim, dtype, kit.arch, causal=True)
    gradients = backward(cfg, dout, q, k, v, out, lse, causal=True)
    rough = reference.naive_gradients(dout, q, k, v, causal=True)
    dout64, q64, k64, v64 = (kit.double(x) for x in (dout, q, k, v))
    exact = reference.naive_gradients(dout64, q64, k64, v64, causal=True)
    for name, *arrays in zip(("dq", "dk", "dv"), gradients, rough, exact, strict=True):
        got, naive_got, expected = (Result(kit.to_numpy(kit.double(x)), None) for x in arrays)
        wrong[name] = complaint(errors(got, expected), errors(naive_got, expected), expected, dtype)
    return "; ".join(f"{name}: {problem}" for name, problem in wrong.items() if problem)
