"""What surrounds the process of a call: the end of the interpreter, threads and cores, the environment, names that are
not text, the floating-point mode. Each test names the failure it guards against."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import flashcute as fc
import numpy as np
import pytest
from conftest import Runner, environment

HEAD = "import os, sys, threading, time, numpy as np, flashcute as fc\n"


def script(*parts: str) -> str:
    return HEAD + "".join(textwrap.dedent(part) for part in parts)


def run_script(code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """As `fresh`, but bytes: what comes and goes need not be text."""
    return subprocess.run(
        [sys.executable, "-c", script(code)],
        env=environment() if env is None else env,
        capture_output=True,
        timeout=120,
    )


# ---- the end of the interpreter ------------------------------------------------------------------

# Daemon threads that repeat a call while the interpreter ends, which takes until each must have asked for the GIL.
ENDING = """
    class Linger:
        def __del__(self, sleep=time.sleep, write=os.write):
            sleep(0.6)
            write(1, b"ended")

    sys.modules["linger"] = Linger()  # dies, and sleeps, when the interpreter has begun to end

    def repeat(started):
        while True:
            CALL
            started.set()

    for _ in range(3):
        started = threading.Event()
        threading.Thread(target=repeat, args=[started], daemon=True).start()
        assert started.wait(60)
"""


def check_end(setup: str, call: str) -> None:
    done = run_script(textwrap.dedent(setup) + textwrap.dedent(ENDING).replace("CALL", call))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ended", b"")


@pytest.mark.parametrize(
    "call",
    [
        "fc.flash_attention(q, q, q)",
        "fc.backward(cfg, q, q, q, q, q, lse)",
        "fc.backward_workspace_size(cfg, q, q)",
        "fc._core.backward_config_for(q, q, q, fc._call.Options())",
        "fc.explain(q, q, q)",
        "fc._core.driver_info()",
    ],
)
@pytest.mark.parametrize("rows", [8, 600])
def test_exit_while_daemon_threads_are_in_calls(call: str, rows: int) -> None:
    """Python before 3.14 unwinds the stack of a thread that asks for the GIL while the interpreter ends; a noexcept
    frame in the way made that an abort (pybind11 2215, pytorch 38228). Of every call that releases the GIL."""
    setup = f"""
        q = np.ones((1, {rows}, 4, 64), np.float32)
        _, lse = fc.flash_attention(q, q, q, return_lse=True)
        cfg = fc.default_backward_config(64, "float32", "cpu")
    """
    check_end(setup, call)


def test_exit_while_a_daemon_thread_exports_an_array() -> None:
    """The same where Python code that a call runs, an array's __dlpack__, waits for the GIL: the frames of the call
    lie below it on the stack."""
    setup = """
        class Slow:
            def __init__(self, array): self.array, self.shape, self.dtype = array, array.shape, array.dtype
            def __dlpack_device__(self): return 1, 0
            def __dlpack__(self, **options):
                time.sleep(0.05)
                return self.array.__dlpack__()

        q = Slow(np.ones((1, 8, 4, 64), np.float32))
        out = np.empty((1, 8, 4, 64), np.float32)
    """
    check_end(setup, "fc.flash_attention(q, q, q, out=out)")


# ---- the environment and the cores ---------------------------------------------------------------

# pool_time(): nanoseconds that threads other than the main one have been on a core.
POOL_TIME = """
    def pool_time():
        tasks = [t for t in os.listdir("/proc/self/task") if int(t) != os.getpid()]
        return sum(int(open(f"/proc/self/task/{t}/schedstat").read().split()[0]) for t in tasks)

    def threads():
        return fc._core.build_info().cpu_threads

    q = np.ones((2, 300, 4, 64), np.float32)
"""


def test_number_of_threads_is_read_at_every_call(fresh: Runner) -> None:
    """FLASHCUTE_NUM_THREADS was read once: a worker that set it after a first call, or after a fork, as a data
    loader's worker_init_fn does, was not obeyed."""
    code = """
        os.environ["FLASHCUTE_NUM_THREADS"] = "4"
        assert threads() == 4
        deadline = time.monotonic() + 30  # the main thread may do all of a call before another wakes
        while pool_time() == 0 and time.monotonic() < deadline: fc.flash_attention(q, q, q)
        assert pool_time() > 0
        time.sleep(0.1)
        os.environ["FLASHCUTE_NUM_THREADS"] = "1"
        assert threads() == 1
        before, own = pool_time(), time.thread_time_ns()
        for _ in range(20): fc.flash_attention(q, q, q)
        # A thread that wakes from an earlier call only now takes microseconds; its share of the work would be half.
        assert pool_time() - before < (time.thread_time_ns() - own) / 10, "the pool worked"
        pid = os.fork()
        if pid == 0:
            os.environ["FLASHCUTE_NUM_THREADS"] = "3"
            os._exit(0 if threads() == 3 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        os.environ["FLASHCUTE_NUM_THREADS"] = "none"
        try: fc.flash_attention(q, q, q)
        except fc.ArgumentError as e: assert "FLASHCUTE_NUM_THREADS" in str(e)
        else: raise AssertionError("no exception")
    """
    fresh(script(POOL_TIME, code), FLASHCUTE_NUM_THREADS=None)


def test_instruction_set_is_read_at_every_call(fresh: Runner) -> None:
    """FLASHCUTE_CPU_ISA was read once."""
    code = """
        q = np.ones((1, 2, 1, 8), np.float32)
        fc.flash_attention(q, q, q)
        os.environ["FLASHCUTE_CPU_ISA"] = "baseline"
        assert fc.explain(q, q, q).kernel == "baseline"
        os.environ["FLASHCUTE_CPU_ISA"] = "avx9"
        try: fc.flash_attention(q, q, q)
        except fc.ArgumentError as e: assert "FLASHCUTE_CPU_ISA" in str(e)
        else: raise AssertionError("no exception")
    """
    fresh(script(code), FLASHCUTE_CPU_ISA=None)


several_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")


def count_cores(fresh: Runner, variables: dict[str, str], before: str = "") -> list[str]:
    """CPUs of the main thread once torch has been imported, and how many threads calls have then."""
    count = "import torch\nprint(len(os.sched_getaffinity(0)), fc._core.build_info().cpu_threads)"
    off = ("FLASHCUTE_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
    env = {**dict.fromkeys(off), **variables}
    return fresh(script(before, count), **env).stdout.split()


@several_cores
@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_PROC_BIND": "true"},
        {"OMP_PROC_BIND": "close", "OMP_PLACES": "threads"},
        {"GOMP_CPU_AFFINITY": " ".join(map(str, sorted(os.sched_getaffinity(0))))},
    ],
    ids=str,
)
def test_cores_of_a_thread_that_openmp_has_pinned(fresh: Runner, variables: dict) -> None:
    """With these variables libgomp pins the thread that imports torch to one core, and calls had one thread
    (pytorch 91989, 149422)."""
    usual, pinned = count_cores(fresh, {}), count_cores(fresh, variables)
    assert pinned[0] == "1", "torch's OpenMP does not pin here: the test shows nothing"
    assert pinned[1] == usual[1]


@several_cores
@pytest.mark.parametrize("variables", [{}, {"OMP_PROC_BIND": "true"}], ids=str)
def test_cores_of_a_limited_process(fresh: Runner, variables: dict) -> None:
    """What taskset sets holds, whether OpenMP pins threads or not: its places are among what it was given."""
    limit = f"os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
    assert count_cores(fresh, variables, limit) == ["1", "1"]


@several_cores
def test_affinity_narrowed_after_a_call(fresh: Runner) -> None:
    """The pool's threads kept the mask of the thread that had started them."""
    code = """
        def of_pool():
            return [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task") if int(t) != os.getpid()]

        fc.flash_attention(q, q, q)
        one = {min(os.sched_getaffinity(0))}
        assert one not in of_pool()
        os.sched_setaffinity(0, one)
        deadline = time.monotonic() + 30  # the main thread may do all of a call before another wakes
        while one not in of_pool() and time.monotonic() < deadline: fc.flash_attention(q, q, q)
        assert one in of_pool()
    """
    fresh(script(POOL_TIME, code), FLASHCUTE_NUM_THREADS="2")


# ---- the floating-point mode ---------------------------------------------------------------------


def test_bits_do_not_depend_on_the_floating_point_mode(fresh: Runner) -> None:
    """The calling thread flushed subnormal numbers, as torch.set_flush_denormal(True) asks, and the pool's threads did
    not: which tile was whose decided on the bits."""
    fresh("""
        import numpy as np, torch, flashcute as fc
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((2, 200, 4, 24)).astype(np.float32) for _ in range(3))
        v *= 1e-39  # subnormal
        dout = rng.standard_normal(v.shape).astype(np.float32)
        cfg = fc.default_backward_config(24, "float32", "cpu")

        def bits():
            out, lse = fc.flash_attention(q, k, v, return_lse=True)
            gradients = fc.backward(cfg, dout, q, k, v, out, lse)
            return [x.tobytes() for x in (out, lse, *gradients)]

        expected = bits()
        assert any(np.frombuffer(expected[0], np.float32))
        assert torch.set_flush_denormal(True)
        for _ in range(5):
            assert bits() == expected
        assert (torch.tensor([1e-310], dtype=torch.float64) * 1).item() == 0, "the mode is gone"
    """)


def test_bits_do_not_depend_on_the_rounding_mode(fresh: Runner) -> None:
    """The default scale, 1 / sqrt(3), was computed as the calling thread rounds."""
    fresh("""
        import ctypes, numpy as np, flashcute as fc
        libm = ctypes.CDLL("libm.so.6")
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, 20, 2, 3)) for _ in range(3))

        def bits():
            return [x.tobytes() for x in fc.flash_attention(q, k, v, return_lse=True)]

        expected = bits()
        for mode in (0x400, 0x800, 0xC00):  # down, up, towards zero, as x86 numbers them
            assert libm.fesetround(mode) == 0
            found = bits()
            libm.fesetround(0)
            assert found == expected, hex(mode)
    """)


def test_environment_that_changes_during_a_call(fresh: Runner, tmp_path: Path) -> None:
    """A call that has released the GIL read variables while another thread's os.environ[...] moved them, which crashes
    now and then. The limit of the cache is read after a kernel was compiled: it is that of the call's beginning."""
    fresh(
        """
        import os, threading, time, flashcute as fc
        failed = []

        def compile():
            try:
                fc.prebuild(fc.ForwardConfig(head_dim=64), "sm_80")
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=compile)
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive(), "compiling takes longer"
        os.environ["FLASHCUTE_CACHE_SIZE"] = "wrong"
        thread.join()
        assert not failed, failed
        """,
        FLASHCUTE_JIT="force",
        FLASHCUTE_CACHE_DIR=str(tmp_path / "cache"),
        FLASHCUTE_CACHE_SIZE=None,
    )


# ---- names that are not text ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        "__import__('pathlib').Path('/opt/mine')",
        "b'/opt/mine'",
        "None",
        "'/opt/caf\\udce9'",
        "'/opt/caf\\u00e9'",
        "''",
    ],
)
def test_import_with_unusual_search_path(entry: str) -> None:
    """import flashcute raised TypeError where sys.path held what Python itself passes over, or a folder whose name is
    not UTF-8."""
    code = f"import sys; sys.path.append({entry}); import flashcute as fc; fc.configs()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_import_from_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    """The package's own folder is told to the library, too."""
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    os.symlink(os.path.dirname(fc.__file__), os.path.join(folder, b"flashcute"))
    env = environment(PYTHONPATH=os.fsdecode(folder))
    done = run_script("assert b'caf\\xe9' in os.fsencode(fc.__file__)\nfc.configs()", env)
    assert done.returncode == 0, done.stderr


def test_values_of_variables_that_are_not_utf8() -> None:
    """UnicodeDecodeError in place of the exception that names the variable, and in place of the folder's name."""
    code = """
        q = np.ones((1, 2, 1, 8), np.float32)
        try: fc.flash_attention(q, q, q)
        except fc.ArgumentError as e: print(e)
    """
    done = run_script(code, environment(FLASHCUTE_NUM_THREADS=os.fsdecode(b"caf\xe9")))
    assert b"FLASHCUTE_NUM_THREADS" in done.stdout, done.stderr
    assert rb"caf\xe9" in done.stdout
    code = "print(fc._core.build_info().cache_folder)"
    done = run_script(code, environment(FLASHCUTE_CACHE_DIR=os.fsdecode(b"/tmp/caf\xe9")))
    assert done.stdout.strip() == rb"/tmp/caf\xe9", done.stderr


def test_exceptions_whose_text_is_not_utf8() -> None:
    """A library's error that quotes such a name came out as UnicodeEncodeError or std::bad_cast."""

    class Broken:
        shape = (1, 2, 1, 8)

        def __dlpack_device__(self) -> tuple[int, int]:
            raise OSError("caf\udce9 is gone")

        def __dlpack__(self) -> None: ...

    q = np.ones((1, 2, 1, 8), np.float32)
    with pytest.raises(fc.ArgumentError, match=r"k: .*caf\\udce9 is gone"):
        fc.forward(fc.default_config(8, "float32", "cpu"), q, Broken(), q)
