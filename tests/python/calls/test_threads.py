"""Calls from several threads and in forked processes."""

from __future__ import annotations

import threading

import flashcute as fc
import numpy as np
import pytest
from conftest import Runner
from tensors import qkv

NAN = float("nan")
INF = float("inf")

# ---- threads --------------------------------------------------------------------------------------


def test_threads_on_the_cpu_start_together(fresh: Runner) -> None:
    """Eight threads make the first calls of a process at once, on several configurations."""
    fresh("""
        import threading, numpy as np, flashcute as fc
        rng = np.random.default_rng(0)
        jobs = []
        for n in range(8):
            dtype = ["float16", "float32", "float64"][n % 3]
            q, k, v = (rng.standard_normal((2, 300, 4, 8 + n)).astype(dtype) for _ in range(3))
            jobs.append((q, k, v, dict(causal=n % 2 == 0, return_lse=True)))
        results = [[] for _ in jobs]
        barrier = threading.Barrier(len(jobs))

        def work(n):
            *qkv, options = jobs[n]
            barrier.wait()
            for _ in range(20):
                results[n].append(fc.flash_attention(*qkv, **options))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
        for t in threads: t.start()
        for t in threads: t.join()
        for (*qkv, options), found in zip(jobs, results):
            out, lse = fc.flash_attention(*qkv, **options)
            assert np.isfinite(out).all()
            assert len(found) == 20
            for o, l in found:
                assert o.tobytes() == out.tobytes() and l.tobytes() == lse.tobytes()
    """)


@pytest.mark.gpu
def test_threads_on_the_gpu_start_together(fresh: Runner) -> None:
    """Eight threads launch four kernels for the first time at once, each on a stream of its own
    ."""
    fresh("""
        import threading, torch, flashcute as fc
        torch.manual_seed(0)
        jobs = []
        for n in range(8):
            dtype = [torch.float16, torch.bfloat16][n % 2]
            d = [64, 128][n // 2 % 2]
            q, k, v = (torch.randn(2, 500, 4, d, dtype=dtype, device="cuda") for _ in range(3))
            jobs.append((q, k, v, n // 4 == 0))
        torch.cuda.synchronize()
        results = [[] for _ in jobs]
        barrier = threading.Barrier(len(jobs))

        def work(n):
            q, k, v, causal = jobs[n]
            stream = torch.cuda.Stream()
            barrier.wait()
            with torch.cuda.stream(stream):
                for _ in range(20):
                    results[n].append(fc.flash_attention(q, k, v, causal))
            stream.synchronize()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
        for t in threads: t.start()
        for t in threads: t.join()
        for (q, k, v, causal), found in zip(jobs, results):
            expected = fc.flash_attention(q, k, v, causal)
            assert torch.isfinite(expected).all()
            assert len(found) == 20
            for out in found:
                assert torch.equal(out, expected)
    """)


def test_the_gil_is_released(rng: np.random.Generator) -> None:
    """Other Python threads run during a long call; none of them waits for its end."""
    q, k, v = qkv(rng, "cpu", sq=2000, sk=2000, dtype="float32")
    running = threading.Event()
    done = threading.Event()

    def call() -> None:
        running.set()
        fc.flash_attention(q, k, v)
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    running.wait()
    turns = 0
    while not done.is_set():
        turns += 1
        done.wait(0.001)
    thread.join()
    assert turns > 3, "this thread had no turn while the other one computed"


# ---- import and fork ------------------------------------------------------------------------------


def test_import_opens_no_cuda_library_and_survives_fork(fresh: Runner) -> None:
    """Import maps neither libcuda nor NVRTC; the thread pool works before a fork, after it in
    both processes, and in a grandchild."""
    fresh("""
        import os, signal, numpy as np
        import flashcute as fc

        def mapped():
            return [l for l in open("/proc/self/maps") if "libcuda" in l or "nvrtc" in l]

        def use():
            q = np.random.default_rng(0).standard_normal((2, 600, 4, 16)).astype(np.float32)
            return fc.flash_attention(q, q, q, causal=True).tobytes()

        assert not mapped(), mapped()
        before = use()
        assert not mapped(), "the CPU backend needs no CUDA library"

        def child(depth):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)  # a child that hangs dies
                ok = use() == before and (depth == 0 or child(depth - 1) == 0)
                os._exit(0 if ok else 1)
            return os.waitpid(pid, 0)[1]

        for _ in range(3):
            assert child(1) == 0
        assert use() == before
    """)


@pytest.mark.gpu
def test_fork_after_import_then_cuda_in_both(fresh: Runner) -> None:
    """CUDA cannot be used in a child if it was initialised before the fork: import does not
    ."""
    fresh("""
        import os, signal, numpy as np, torch
        import flashcute as fc
        x = np.ones((1, 300, 2, 16), np.float32)
        fc.flash_attention(x, x, x)
        fc.default_config(64, arch="sm_90"), fc.configs()

        def use():
            q = torch.ones(1, 200, 2, 64, dtype=torch.float16, device="cuda")
            assert bool((fc.flash_attention(q, q, q) == 1).all())

        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            use()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        use()
    """)
