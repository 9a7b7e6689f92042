"""The first call of a process may be a traced one: nothing may depend on an eager call that filled a cache before.
Each test is a process of its own."""

from __future__ import annotations

import textwrap

import pytest
from conftest import Runner

BEFORE = """
import warnings
import torch, flashcute as fc

device = {device!r}
dtype = torch.float32 if device == "cpu" else torch.float16  # compiled ahead of time
torch.manual_seed(0)
q, k, v = (torch.randn(2, s, h, 64, dtype=dtype, device=device) for s, h in ((17, 4), (23, 2), (23, 2)))
dout = torch.randn_like(q)

def attend(q, k, v):
    return fc.flash_attention(q, k, v, causal=True) * 2

def differentiated(function, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")

def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
"""

FIRST_CALLS = {
    "compile": """
        same([compiled(attend)(q, k, v)], [attend(q, k, v)])
    """,
    "compile for any length": """
        fast = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
        same([fast(q, k, v)], [attend(q, k, v)])
    """,
    "compile with gradients": """
        same(differentiated(compiled(attend), q, k, v), differentiated(attend, q, k, v))
    """,
    "compile under autocast": """
        with torch.autocast(device, torch.bfloat16):
            found = compiled(attend)(q, k, v)
            assert found.dtype == torch.bfloat16
            same([found], [attend(q, k, v)])
    """,
    "compile of parameters": """
        class Layer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.q = torch.nn.Parameter(q)
            def forward(self, k, v):
                return attend(self.q, k, v)
        layer = Layer()
        same([compiled(layer)(k, v)], [layer(k, v)])
    """,
    "compile of a subclass": """
        class Mine(torch.Tensor):
            pass
        # aot_eager refuses an operator that is not torch's own on a subclass ("Multiple dispatch failed").
        fast = torch.compile(attend, fullgraph=True, backend="eager")
        same([fast(q.as_subclass(Mine), k, v)], [attend(q, k, v)])
    """,
    "compile of what no kernel serves": """
        def not_served(q, k, v):
            return fc.flash_attention(q, k, v, dropout_p=1e-30)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = compiled(not_served)(q, k, v)
        assert any("dropout_p=1e-30 is not supported" in str(one.message) for one in caught)
        warnings.simplefilter("ignore")
        same([found], [not_served(q, k, v)])
    """,
    "compile of vmap": """
        same([compiled(torch.vmap(attend, (0, None, None)))(torch.stack([q, -q]), k, v)[1]], [attend(-q, k, v)])
    """,
    "export": """
        class Attention(torch.nn.Module):
            def forward(self, q, k, v):
                return attend(q, k, v)
        program = torch.export.export(Attention(), (q, k, v))
        assert "flashcute.flash_attention_forward" in str(program.graph)
        same([program.module()(q, k, v)], [attend(q, k, v)])
    """,
    "make_fx": """
        from torch.fx.experimental.proxy_tensor import make_fx
        for mode in ("real", "fake", "symbolic"):
            graph = make_fx(attend, tracing_mode=mode)(q, k, v)
            same([graph(-q, k, v)], [attend(-q, k, v)])
    """,
    "jit.trace": """
        same([torch.jit.trace(attend, (q, k, v))(-q, k, v)], [attend(-q, k, v)])
    """,
    "fake tensors": """
        from torch._subclasses import FakeTensorMode
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        outside = attend(*fakes)
        with mode:
            inside = attend(*fakes)
        for fake in (outside, inside):
            assert isinstance(fake, torch._subclasses.FakeTensor)
            assert (fake.shape, fake.dtype, fake.device.type) == (q.shape, dtype, device)
    """,
    "vmap": """
        same([torch.func.vmap(attend, (0, None, None))(torch.stack([q, -q]), k, v)[1]], [attend(-q, k, v)])
    """,
    "autocast": """
        with torch.autocast(device, torch.bfloat16):
            found = attend(q, k, v)
        same([found], [attend(*(x.bfloat16() for x in (q, k, v)))])
    """,
    "a subclass": """
        class Mine(torch.Tensor):
            pass
        found = differentiated(attend, *(x.as_subclass(Mine) for x in (q, k, v)))
        same([x.as_subclass(torch.Tensor) for x in found], differentiated(attend, q, k, v))
    """,
    "a subclass with operators of its own": """
        from torch.testing._internal.two_tensor import TwoTensor
        found = differentiated(attend, *(TwoTensor(x, -x) for x in (q, k, v)))
        assert all(isinstance(x, TwoTensor) for x in found)
        same([x.a for x in found], differentiated(attend, q, k, v))
    """,
    "a counter of FLOPs": """
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            attend(q, k, v)
        assert counter.get_total_flops() > 0
    """,
}


@pytest.mark.parametrize("first", FIRST_CALLS)
def test_first_call(fresh: Runner, device: str, first: str) -> None:
    """torch.compile of torch 2.11 refused a first call that later ones passed: it traced the look-up of a class
    ("Unsupported method call ... getset_descriptor")."""
    fresh(BEFORE.format(device=device) + textwrap.dedent(FIRST_CALLS[first]))
