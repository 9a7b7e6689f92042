"""CUDA graphs, streams and devices: a call works where the caller says."""

from __future__ import annotations

from collections.abc import Callable

import flashcute as fc
import numpy as np
import oracle
import pytest
from conftest import Runner
from optional_torch import torch
from tensors import attend, problem, qkv, same_bits

NAN = float("nan")
INF = float("inf")

# ---- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graph_replay_with_changed_inputs(rng: np.random.Generator) -> None:
    """A captured call does its work again on what the tensors hold then; outputs come from the
    graph's pool."""
    q, k, v = qkv(rng, "cuda", sq=200, sk=300)
    attend(q, k, v, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, k, v, causal=True)
    for _ in range(3):
        for x, new in zip((q, k, v), qkv(rng, "cuda", sq=200, sk=300), strict=True):
            x.copy_(new)
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        oracle.assert_accurate(problem(q, k, v, causal=True), out, lse)


@pytest.mark.gpu
def test_first_call_inside_a_capture(fresh: Runner) -> None:
    """Loading a kernel synchronises, which a capture forbids: it must be done aside. In a
    fresh process, where no kernel has been loaded, and in the strictest capture mode."""
    fresh("""
        import torch, flashcute as fc
        q, k, v = (torch.randn(2, 200, 4, 64, dtype=torch.float16, device="cuda") for _ in range(3))
        out = torch.full_like(q, float("nan"))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            fc.flash_attention(q, k, v, causal=True, out=out)
        assert out.isnan().all(), "it ran instead of being captured"
        for _ in range(2):
            q.copy_(torch.randn_like(q))
            graph.replay()
            captured = out.clone()
            out.fill_(float("nan"))
            assert torch.equal(captured, fc.flash_attention(q, k, v, causal=True))
    """)


# ---- streams --------------------------------------------------------------------------------------

SPIN = 200_000_000  # clock cycles: about a tenth of a second


class BusyStream:
    """A side stream that computes for a while before it fills q, k, v, which hold 0 until then."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.final = qkv(rng, "cuda", sq=200, sk=300)
        self.now = [torch.zeros_like(x) for x in self.final]
        self.expected, self.lse = attend(
            *self.final, causal=True
        )  # the kernel is loaded from here on
        self.stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(SPIN)
            for x, final in zip(self.now, self.final, strict=True):
                x.copy_(final)

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        assert not self.stream.query(), "the call waited for the GPU, or the spin was too short"
        self.stream.synchronize()
        assert same_bits(out, self.expected)
        assert same_bits(lse, self.lse)


@pytest.mark.gpu
def test_current_stream_is_used(rng: np.random.Generator) -> None:
    """The inputs are produced on the current side stream: the kernel waits for them, the host
    does not."""
    busy = BusyStream(rng)
    with torch.cuda.stream(busy.stream):
        out, lse = attend(*busy.now, causal=True)
    busy.check(out, lse)


class WithProtocol:
    """A stream of some other library."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spelled",
    [
        pytest.param(lambda s: s, id="torch Stream"),
        pytest.param(lambda s: torch.cuda.ExternalStream(s.cuda_stream), id="ExternalStream"),
        pytest.param(lambda s: s.cuda_stream, id="address"),
        pytest.param(WithProtocol, id="__cuda_stream__"),
    ],
)
def test_stream_argument(rng: np.random.Generator, spelled: Callable) -> None:
    """stream= is where the kernel runs, though another stream is current."""
    busy = BusyStream(rng)
    out, lse = attend(*busy.now, causal=True, stream=spelled(busy.stream))
    busy.check(out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [0, "default"])
def test_default_stream_by_name(rng: np.random.Generator, stream: object) -> None:
    """The default stream's address is 0, which is not "none given"."""
    q, k, v = qkv(rng, "cuda")
    expected, _ = attend(q, k, v)
    if stream == "default":
        stream = torch.cuda.default_stream()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN)
        out, _ = attend(q, k, v, stream=stream)
    torch.cuda.default_stream().synchronize()
    assert not side.query(), "it ran behind the spin, on the side stream"
    assert same_bits(out, expected)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_memory_in_use_on_another_stream_is_not_given_away(rng: np.random.Generator) -> None:
    """Inputs that are freed right after the call must not be reused while the kernel still waits
    for its stream: torch is told that the stream uses them."""
    q, k, v = qkv(rng, "cuda", sq=1000, sk=1000)
    expected, _ = attend(q, k, v)
    shapes = [q.shape, k.shape, v.shape]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN)
    out = fc.flash_attention(q, k, v, stream=side)
    del q, k, v
    garbage = [torch.full(s, NAN, dtype=torch.float16, device="cuda") for s in 4 * shapes]
    torch.cuda.default_stream().synchronize()
    assert not side.query(), "the spin was too short"
    side.synchronize()
    assert same_bits(out, expected)
    del garbage


@pytest.mark.gpu
def test_cupy_streams(rng: np.random.Generator) -> None:
    """CuPy's current stream is used; another one is refused, because CuPy cannot be told of it
    ."""
    cupy = pytest.importorskip("cupy")
    q, k, v = (cupy.asarray(x.cpu().numpy()) for x in qkv(rng, "cuda", sq=200, sk=300))
    expected = fc.flash_attention(q, k, v)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    sentinel = cupy.full_like(q, 7)
    with pytest.raises(fc.ArgumentError, match=r"^stream: expected the current stream .*, got \d+"):
        fc.flash_attention(q, k, v, out=sentinel, stream=stream)
    cupy.cuda.Device().synchronize()
    assert bool((sentinel == 7).all())
    with stream:
        mine = fc.flash_attention(q, k, v)
        named = fc.flash_attention(q, k, v, stream=stream)
    stream.synchronize()
    for out in (mine, named):
        assert not bool(cupy.isnan(out).any())
        assert out.tobytes() == expected.tobytes()


# ---- devices --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k", "v", "out"])
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_mixed_devices_raise(rng: np.random.Generator, name: str, first: str) -> None:
    """A tensor elsewhere is named, with both devices, before anything runs."""
    other = {"cpu": "cuda", "cuda": "cpu"}[first]
    tensors = dict(zip("qkv", qkv(rng, first), strict=True))
    tensors["out"] = torch.full_like(tensors["q"], 7)
    tensors[name] = tensors[name].to(other)
    spelled = {"cpu": "cpu", "cuda": "cuda:0"}
    message = rf"^{name}: expected device {spelled[first]} as in q, got {spelled[other]}"
    with pytest.raises(fc.ArgumentError, match=message):
        fc.flash_attention(**tensors)
    torch.cuda.synchronize()
    assert (tensors["out"] == 7).all()


@pytest.mark.gpu
def test_tensors_on_another_gpu_than_the_current_one(rng: np.random.Generator) -> None:
    """cuda:0 is current, the tensors are on cuda:1: it runs there, and cuda:0 stays current
    ."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = qkv(rng, "cuda:0")
    there = [x.to("cuda:1") for x in here]
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.device(0):
        expected, _ = attend(*here)
        out, lse = attend(*there)
        assert torch.cuda.current_device() == 0
        with pytest.raises(
            fc.ArgumentError, match=r"^k: expected device cuda:0 as in q, got cuda:1"
        ):
            fc.flash_attention(here[0], there[1], here[2])
    assert out.device == lse.device == torch.device("cuda:1")
    torch.cuda.synchronize("cuda:1")
    assert same_bits(out.to("cuda:0"), expected)
