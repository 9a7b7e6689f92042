"""Memory of a call, and what the extension links: neither grows behind the caller's back."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import flashcute as fc
import pytest
from conftest import Runner
from optional_torch import torch
from tensors import attend


def test_memory_on_the_cpu_grows_with_the_length_only(fresh: Runner) -> None:
    """The score matrix of this call would have 268 million elements; the process grows by far
    less."""
    fresh("""
        import resource, numpy as np, flashcute as fc
        S = 16384
        q, k, v = (np.ones((1, S, 1, 8), np.float16) for _ in range(3))
        fc.flash_attention(q[:, :300], k[:, :300], v[:, :300], return_lse=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out, lse = fc.flash_attention(q, k, v, return_lse=True)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert (out == 1).all()
        assert grown < S * S // 16, f"{grown / 1e6} MB"
    """)


@pytest.mark.gpu
def test_memory_on_the_gpu_is_that_of_the_results() -> None:
    """torch's allocator gives memory for out and LSE, and nobody takes any beside it."""
    length = 32768
    q, k, v = (torch.ones(1, length, 1, 64, dtype=torch.float16, device="cuda") for _ in range(3))
    attend(q, k, v, causal=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    out, lse = attend(q, k, v, causal=True)
    torch.cuda.synchronize()
    results = out.numel() * 2 + lse.numel() * 4
    assert torch.cuda.max_memory_allocated() - before <= results + 4096
    assert free - torch.cuda.mem_get_info()[0] < length * length // 16


def needed_libraries(path: str) -> list[str]:
    """DT_NEEDED of a 64-bit little-endian ELF file."""
    data = Path(path).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
    dynamic = next(h for h in headers if h[1] == 6)
    strings = headers[dynamic[6]][4]
    names = []
    for at in range(dynamic[4], dynamic[4] + dynamic[5], 16):
        tag, value = struct.unpack_from("<QQ", data, at)
        if tag == 1:
            start = strings + value
            names.append(data[start : data.index(b"\0", start)].decode())
    return names


def test_the_extension_links_neither_torch_nor_cuda() -> None:
    """It is opened where none of them is installed, and with any version of torch."""
    names = needed_libraries(fc._core.__file__)
    assert any(name.startswith("libc.so") for name in names), names
    allowed = (
        "libc.",
        "libm.",
        "libstdc++.",
        "libgcc_s.",
        "libpthread.",
        "libdl.",
        "librt.",
        "ld-linux",
    )
    assert [name for name in names if not name.startswith(allowed)] == []
    ctypes.CDLL(fc._core.__file__, mode=ctypes.RTLD_LOCAL | 2)  # RTLD_NOW: every symbol resolves
