"""The array libraries that the commands work with: arrays, clocks and memory meters.

A kit is one library on one device. Its arrays are float16, bfloat16, float32 or float64, named so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from .. import _core
from .options import UsageError

Array = Any
Inputs = tuple[Array, Array, Array]  # q, k, v
Call = Callable[[], object]


class Kit(ABC):
    """One array library on one device."""

    library: str
    device: str  # "cpu" or "cuda"
    memory_meter: str  # how peak_bytes measures

    @property
    def arch(self) -> str:
        """What default_config wants to know."""
        return "cpu" if self.device == "cpu" else f"sm_{_core.driver_info().gpus[0].arch}"

    @property
    @abstractmethod
    def version(self) -> str:
        """Of the library."""

    # ---- arrays --------------------------------------------------------------------------------

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: str) -> Array: ...

    @abstractmethod
    def normal(self, shape: Sequence[int], dtype: str) -> Array:
        """Fresh numbers of the standard normal distribution, from the kit's seed onwards."""

    @abstractmethod
    def array(self, values: Any, dtype: str) -> Array:
        """From a NumPy array."""

    @abstractmethod
    def lengths(self, batch: int) -> Array:
        """int32 (batch,), of any numbers."""

    @abstractmethod
    def double(self, array: Array) -> Array:
        """As float64, on the same device."""

    @abstractmethod
    def to_numpy(self, array: Array) -> Any:
        """As a float64 NumPy array."""

    def poisoned(self, shape: Sequence[int], dtype: str) -> Array:
        """Full of NaN: what is not written shows."""
        poisoned = self.empty(shape, dtype)
        poisoned[...] = float("nan")
        return poisoned

    @abstractmethod
    def empty_like(self, array: Array) -> Array: ...

    @abstractmethod
    def swap_heads(self, array: Array) -> Array:
        """(a, b, c, d) as a contiguous (a, c, b, d): bshd to bhsd and back."""

    # ---- meters --------------------------------------------------------------------------------

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the device has done what it was told to do."""

    @abstractmethod
    def samples_ms(self, call: Call, samples: int, repeats: int) -> list[float]:
        """Milliseconds per call: `samples` times, each the mean of `repeats` calls in a row."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that an allocation could have."""

    @abstractmethod
    def peak_bytes(self, call: Call) -> int | None:
        """Memory that a call needs while it runs, its result included; None if unknown."""

    def repeatable(self, call: Call) -> tuple[Call, str]:
        """A call that does the same with as little host work as can be, and how: for timing."""
        for _ in range(2):
            call()
        return call, "calls"

    def on_capture_stream(self) -> contextlib.AbstractContextManager[object]:
        """Where `repeatable` may capture: for what a call does on a stream that was current before."""
        return contextlib.nullcontext()


class _CpuKit(Kit):
    device = "cpu"
    memory_meter = "growth of the peak resident memory of the process"

    def synchronize(self) -> None:
        pass

    def samples_ms(self, call: Call, samples: int, repeats: int) -> list[float]:
        result = []
        for _ in range(samples):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            result.append((time.perf_counter() - start) / repeats * 1e3)
        return result

    def free_bytes(self) -> int:
        return _proc_bytes("/proc/meminfo", "MemAvailable")

    def peak_bytes(self, call: Call) -> int | None:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(
                0
            )  # what was freed before must not hide what is allocated
        try:
            with open("/proc/self/clear_refs", "w") as reset:
                reset.write("5")  # the peak starts again from what is resident now
        except OSError:
            return None
        before = _proc_bytes("/proc/self/status", "VmRSS")
        result = call()
        peak = _proc_bytes("/proc/self/status", "VmHWM")
        del result
        return max(0, peak - before)


def _proc_bytes(file: str, field: str) -> int:
    """Of a line like "VmHWM:  1234 kB"."""
    with open(file) as lines:
        line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


class NumPyKit(_CpuKit):
    library = "numpy"

    def __init__(self, seed: int) -> None:
        self.np: Any = import_module("numpy")
        self.random = self.np.random.default_rng(seed)

    @property
    def version(self) -> str:
        return str(self.np.__version__)

    def dtype(self, name: str) -> Any:
        if name == "bfloat16":
            if find_spec("ml_dtypes") is None:
                raise UsageError("--dtype bfloat16: NumPy has none: install torch or ml_dtypes")
            return self.np.dtype(import_module("ml_dtypes").bfloat16)
        return self.np.dtype(name)

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        return self.np.empty(shape, self.dtype(dtype))

    def normal(self, shape: Sequence[int], dtype: str) -> Array:
        return self.array(self.random.standard_normal(shape), dtype)

    def array(self, values: Any, dtype: str) -> Array:
        return values.astype(self.dtype(dtype))

    def lengths(self, batch: int) -> Array:
        return self.np.empty(batch, "int32")

    def double(self, array: Array) -> Array:
        return array.astype("float64")

    def to_numpy(self, array: Array) -> Any:
        return self.double(array)

    def empty_like(self, array: Array) -> Array:
        return self.np.empty_like(array)

    def swap_heads(self, array: Array) -> Array:
        return self.np.ascontiguousarray(array.swapaxes(1, 2))


class _Torch(Kit):
    library = "torch"

    def __init__(self, seed: int) -> None:
        self.torch: Any = import_module("torch")
        self.random = self.torch.Generator(self.device).manual_seed(seed)

    @property
    def version(self) -> str:
        return str(self.torch.__version__)

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=self.device)

    def normal(self, shape: Sequence[int], dtype: str) -> Array:
        return self.torch.randn(
            shape, dtype=getattr(self.torch, dtype), device=self.device, generator=self.random
        )

    def array(self, values: Any, dtype: str) -> Array:
        return self.torch.from_numpy(values).to(self.device, getattr(self.torch, dtype))

    def lengths(self, batch: int) -> Array:
        return self.torch.empty(batch, dtype=self.torch.int32, device=self.device)

    def double(self, array: Array) -> Array:
        return array.double()

    def to_numpy(self, array: Array) -> Any:
        return array.double().cpu().numpy()

    def empty_like(self, array: Array) -> Array:
        return self.torch.empty_like(array)

    def swap_heads(self, array: Array) -> Array:
        return array.transpose(1, 2).contiguous()


class TorchCpuKit(_Torch, _CpuKit):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.torch.set_num_threads(_core.build_info().cpu_threads)  # the same for everyone


class TorchCudaKit(_Torch):
    device = "cuda"
    memory_meter = "peak of torch's CUDA allocator"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.side = self.torch.cuda.Stream()

    @contextlib.contextmanager
    def on_capture_stream(self) -> Iterator[None]:
        cuda = self.torch.cuda
        self.side.wait_stream(cuda.current_stream())
        with cuda.stream(self.side):
            yield
        cuda.current_stream().wait_stream(self.side)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def samples_ms(self, call: Call, samples: int, repeats: int) -> list[float]:
        marks = [self.torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(repeats):
                call()
            mark.record()
        self.torch.cuda.synchronize()
        return [start.elapsed_time(end) / repeats for start, end in pairwise(marks)]

    def free_bytes(self) -> int:
        self.torch.cuda.empty_cache()
        return int(self.torch.cuda.mem_get_info()[0])

    def peak_bytes(self, call: Call) -> int | None:
        cuda = self.torch.cuda
        gc.collect()
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        result = call()
        cuda.synchronize()
        del result
        return int(cuda.max_memory_allocated()) - int(before)

    def repeatable(self, call: Call) -> tuple[Call, str]:
        """A CUDA graph of the call, if it can be captured: a replay costs the host little."""
        cuda = self.torch.cuda
        with self.on_capture_stream():
            for _ in range(3):
                call()
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph, stream=self.side):
                result = call()
            graph.replay()
            cuda.synchronize()
        except RuntimeError:
            cuda.synchronize()
            return call, "calls"

        def replay(alive: tuple[object, ...] = (call, result)) -> None:  # inputs and output stay
            graph.replay()

        return replay, "CUDA graph"


class CuPyKit(Kit):
    library = "cupy"
    device = "cuda"
    memory_meter = "growth of CuPy's memory pool"

    def __init__(self, seed: int) -> None:
        self.cupy: Any = import_module("cupy")
        self.random = self.cupy.random.RandomState(seed)

    @property
    def version(self) -> str:
        return str(self.cupy.__version__)

    def dtype(self, name: str) -> Any:
        if name == "bfloat16":
            raise UsageError("--dtype bfloat16: CuPy has none: install torch, or take float16")
        return self.cupy.dtype(name)

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        return self.cupy.empty(shape, self.dtype(dtype))

    def normal(self, shape: Sequence[int], dtype: str) -> Array:
        return self.random.standard_normal(shape, dtype="float32").astype(self.dtype(dtype))

    def array(self, values: Any, dtype: str) -> Array:
        return self.cupy.asarray(values).astype(self.dtype(dtype))

    def lengths(self, batch: int) -> Array:
        return self.cupy.empty(batch, "int32")

    def double(self, array: Array) -> Array:
        return array.astype("float64")

    def to_numpy(self, array: Array) -> Any:
        return self.cupy.asnumpy(array.astype("float64"))

    def empty_like(self, array: Array) -> Array:
        return self.cupy.empty_like(array)

    def swap_heads(self, array: Array) -> Array:
        return self.cupy.ascontiguousarray(array.swapaxes(1, 2))

    def synchronize(self) -> None:
        self.cupy.cuda.get_current_stream().synchronize()

    def samples_ms(self, call: Call, samples: int, repeats: int) -> list[float]:
        marks = [self.cupy.cuda.Event() for _ in range(samples + 1)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(repeats):
                call()
            mark.record()
        marks[-1].synchronize()
        elapsed = self.cupy.cuda.get_elapsed_time
        return [elapsed(start, end) / repeats for start, end in pairwise(marks)]

    def free_bytes(self) -> int:
        self.cupy.get_default_memory_pool().free_all_blocks()
        return int(self.cupy.cuda.runtime.memGetInfo()[0])

    def peak_bytes(self, call: Call) -> int | None:
        pool = self.cupy.get_default_memory_pool()
        gc.collect()
        pool.free_all_blocks()
        before = pool.total_bytes()
        result = call()
        self.synchronize()
        del result
        return int(pool.total_bytes() - before)


def in_layout(kit: Kit, inputs: Inputs, layout: str) -> Inputs:
    """bshd inputs in a layout, contiguous."""
    if layout == "bshd":
        return inputs
    q, k, v = inputs
    return kit.swap_heads(q), kit.swap_heads(k), kit.swap_heads(v)


# ---- choosing one ------------------------------------------------------------------------------


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default): the GPU if there is one and torch or CuPy can use it, otherwise the CPU",
    )


@functools.cache
def _torch_sees_a_gpu() -> bool:
    return find_spec("torch") is not None and bool(import_module("torch").cuda.is_available())


def choose_kit(
    device: str, dtype: str | None = None, seed: int = 0, *, prefer_numpy: bool = False
) -> Kit:
    """The kit for a device; a library is imported only if it will be used.

    On the CPU that is torch if it is installed, for its attention to be compared with; with
    prefer_numpy it is NumPy, if that has the dtype.
    """
    gpus = [] if device == "cpu" else _core.driver_info().gpus
    if gpus and _torch_sees_a_gpu():
        return TorchCudaKit(seed)
    if gpus and find_spec("cupy") is not None and dtype != "bfloat16":
        return CuPyKit(seed)
    if gpus:
        problem = "neither torch nor CuPy can use the GPU: install one that is built for CUDA"
    else:
        problem = _core.driver_info().problem or "the driver reports no GPU"
    if device == "cuda":
        raise UsageError(f"--device cuda: {problem}")
    if gpus:
        print(f"note: running on the CPU: {problem}", file=sys.stderr)
    numpy_will_do = dtype != "bfloat16" or find_spec("ml_dtypes") is not None
    if find_spec("torch") is None or (prefer_numpy and numpy_will_do):
        return NumPyKit(seed)
    return TorchCpuKit(seed)
