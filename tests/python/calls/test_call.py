"""What a call computes is one value, which all that a call goes through sees whole."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from flashcute import attention, configurations, inspection
from flashcute._call import Options, checked_options
from optional_torch import REASON, torch
from tensors import with_variant

dispatch, autograd, fallback, gradients, problem = (
    pytest.importorskip(f"flashcute._torch.{name}", reason=REASON, exc_type=ImportError)
    for name in ("dispatch", "autograd", "fallback", "gradients", "problem")
)

OPTIONS: dict[str, Any] = {
    "causal": True,
    "diagonal": -1,
    "scale": 0.25,
    "layout": "bhsd",
    "allow_tf32": True,
    "deterministic": True,
    "window": (3, 1),
    "prefix": 2,
    "prefixes": torch.tensor([3], dtype=torch.int32),
    "seqlens_q": torch.tensor([4], dtype=torch.int32),
    "seqlens_k": torch.tensor([6], dtype=torch.int32),
    "sink": torch.tensor([0.5, -1.0]),
}


class Recorder:
    """In the place of a module's `_core`: what the library is told, by the function's name."""

    def __init__(self) -> None:
        self.told: dict[str, list[Options]] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(fc._core, name)
        if not callable(real) or isinstance(real, type):
            return real

        def call(*arguments: Any) -> Any:
            if isinstance(arguments[-1], Options):
                self.told.setdefault(name, []).append(arguments[-1])
            return real(*arguments)

        return call

    def one(self, name: str) -> Options:
        (options,) = self.told.pop(name)
        return options


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for module in (fc._call, attention, configurations, inspection, dispatch, fallback, gradients):
        monkeypatch.setattr(module, "_core", recorder)
    return recorder


def qkv(grad: bool = False, rows: int = 5) -> list[Any]:
    return [torch.randn(1, 2, n, 8).requires_grad_(grad) for n in (rows, 7, 7)]


def test_the_tuple_is_what_the_library_reads() -> None:
    """C++ reads it by position: a member that moves on one side alone would be taken for another."""
    assert Options._fields == tuple(fc._core.option_names())
    q = np.ones((1, 2, 1, 8), np.float32)
    for wrong in (
        (), tuple(Options())[:-1], Options()._replace(causal=1), Options()._replace(layout="hsbd"),
        Options()._replace(layout=None), Options()._replace(diagonal="end"), list(Options()),
        Options()._replace(scale="x"), Options()._replace(stream="s"), None,
    ):  # fmt: skip
        with pytest.raises(TypeError):
            fc._core.check_problem(q, q, q, wrong)


def test_a_checked_value_is_an_ordinary_one() -> None:
    """It is made by a shortcut, which must not leave members out."""
    assert checked_options(False, "end", None, "bshd") == Options()
    made = checked_options(np.bool_(True), "start", 2, "bhsd", 7, 1, False)
    assert made == Options(True, 0, 2.0, "bhsd", 7, True, False)
    assert type(made) is Options
    assert [type(x) for x in made[:8]] == [bool, int, float, str, int, bool, bool, bool]
    assert checked_options(False, "end", None, "bshd", window=(3, -1)) == Options(window_left=3)
    assert made._replace(causal=False).diagonal == 0


def same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_every_call(core: Recorder, name: str) -> None:
    """An option that a road drops on its way: computed as if it were not given."""
    given: dict[str, Any] = {"prefix" if name == "prefixes" else name: OPTIONS[name]}
    if name in ("diagonal", "prefix", "prefixes"):
        given["causal"] = True
    plain = {n: x for n, x in given.items() if n not in ("allow_tf32", "deterministic")}
    plain = plain if name in ("scale", "layout") else with_variant(**plain)
    q, k, v = qkv()
    with torch.no_grad():
        q_heads = q if name == "layout" else q.transpose(1, 2)
        k_heads, v_heads = (x if name == "layout" else x.transpose(1, 2) for x in (k, v))
        arrays = q_heads, k_heads, v_heads

    def check(function: str, wanted: dict[str, Any]) -> None:
        found = core.one(function)
        if "window" in wanted:
            left, right = wanted["window"]
            wanted = {**wanted, "window_left": left, "window_right": right}
            del wanted["window"]
        if name == "prefixes":
            wanted = {**wanted, "prefixes": wanted["prefix"], "prefix": None}
        assert all(same(getattr(found, n), x) for n, x in wanted.items())

    fc.flash_attention(*(x.numpy() for x in arrays), **given)
    check("forward", given)
    fc.flash_attention(*arrays, **given)
    check("forward", given)
    fc.explain(*arrays, **given)
    check("explain", given)
    fc.explain(*(x.numpy() for x in arrays), **given)
    check("explain", given)
    fc.explain(*arrays, gradients=True, **given)
    check("explain", {**given, "gradients_follow": True})
    cfg = fc.default_config(8, "float32", "cpu")
    out, lse = fc.forward(cfg, *arrays, return_lse=True, **plain)
    known = {n: x for n, x in given.items() if n not in ("allow_tf32", "deterministic")}
    check("forward", known)
    gradients = fc.default_backward_config(8, "float32", "cpu")
    fc.backward(gradients, torch.ones_like(out), *arrays, out, lse, **plain)
    check("backward", known)
    check("backward_workspace_size", known)
    if name != "scale":
        fc.count_blocks(cfg, *arrays, **plain)
        check("forward", known)
    leaves = [x.detach().requires_grad_() for x in arrays]
    fc.flash_attention(*leaves, **given).sum().backward()
    check("forward", {**given, "gradients_follow": True})
    check("backward", {n: x for n, x in given.items() if n != "allow_tf32"})
    torch._dynamo.reset()
    attend = torch.compile(
        lambda *x: fc.flash_attention(*x, **given), fullgraph=True, backend="aot_eager"
    )
    attend(*leaves).sum().backward()
    check("forward", {n: x for n, x in given.items() if n != "deterministic"})
    check("backward", {n: x for n, x in given.items() if n != "allow_tf32"})


def test_a_stream_object_stays_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ reads an address. On a GPU, where gradients are recorded on a stream that is an object, the question whether
    there are kernels for them failed. Here without a GPU: with what looks like tensors on one."""
    tensor = SimpleNamespace(is_cuda=True, requires_grad=True)
    stream = SimpleNamespace(cuda_stream=7)
    told: list[Options] = []
    core = SimpleNamespace(backward_config_for=lambda *arguments: told.append(arguments[-1]))
    monkeypatch.setattr(dispatch, "_core", core)
    options = checked_options(False, "end", None, "bshd", stream, deterministic=True)
    asked = problem.Problem(tensor, tensor, tensor, options, None, 0.0)
    assert dispatch.missing_gradient(asked, traced=False) is None
    fc._core.check_problem(*[np.ones((1, 2, 1, 8), np.float32)] * 3, told[0])  # takes these options
    assert told[0].deterministic


# ---- deterministic -------------------------------------------------------------------------------


def eager(**options: Any) -> Any:
    return fc.flash_attention(*qkv(True), layout="bhsd", **options)


def compiled(**options: Any) -> Any:
    torch._dynamo.reset()
    attend = torch.compile(
        lambda *x: fc.flash_attention(*x, layout="bhsd", **options),
        fullgraph=True,
        backend="aot_eager",
    )
    return attend(*qkv(True))


@pytest.mark.parametrize("attend", [eager, compiled])
@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_deterministic_gradients(
    core: Recorder, attend: Callable[..., Any], asked: bool | None, switch: bool
) -> None:
    """The argument is taken before torch's switch; without it the switch counts, as it is when the gradients are
    computed."""
    # torch refuses to run a compiled backward under another switch than its forward.
    before = not switch if attend is eager else switch
    torch.use_deterministic_algorithms(before, warn_only=True)  # conftest.py resets it
    out = attend(**({} if asked is None else {"deterministic": asked}))
    torch.use_deterministic_algorithms(switch, warn_only=True)
    out.sum().backward()
    assert core.one("backward").deterministic == (switch if asked is None else asked)


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_deterministic_means_the_same_everywhere(
    core: Recorder, asked: bool | None, switch: bool
) -> None:
    """explain, which tells of the gradients, and default_backward_config, which gives their configuration."""
    torch.use_deterministic_algorithms(switch, warn_only=True)
    expected = switch if asked is None else asked
    fc.explain(*qkv(True), layout="bhsd", deterministic=asked)
    told = core.one("explain")
    assert (told.deterministic, told.gradients_follow) == (expected, True)
    cfg = fc.default_backward_config(64, arch="sm_80", deterministic=asked)
    assert cfg.deterministic == expected


@pytest.mark.parametrize("wrong", [0, 1, "yes"])
@pytest.mark.parametrize("call", [fc.flash_attention, fc.explain])
def test_no_deterministic(call: Callable[..., Any], wrong: Any) -> None:
    """By name."""
    with pytest.raises(fc.ArgumentError, match=r"^deterministic: expected True, False or None"):
        call(*qkv(), layout="bhsd", deterministic=wrong)


# ---- streams, architectures ----------------------------------------------------------------------


def test_a_stream_lives_until_the_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an object that owns its stream only the address was kept: the gradients ran on a stream that was gone."""

    class Stream:
        ptr = 5

    monkeypatch.setattr(
        autograd, "run", lambda *_, **__: (torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5))
    )
    stream = Stream()
    alive = weakref.ref(stream)
    out = fc.flash_attention(*qkv(True), layout="bhsd", stream=stream)
    del stream
    gc.collect()
    assert alive() is not None
    del out
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("arch", [None, 80, 90])
def test_default_architecture(monkeypatch: pytest.MonkeyPatch, arch: int | None) -> None:
    """The same call for the forward and the gradients gave configurations for two machines."""

    class Gpu:
        def __init__(self, arch: int) -> None:
            self.arch = arch

    class Core(Recorder):
        def driver_info(self) -> Any:
            return type("Driver", (), {"gpus": [] if arch is None else [Gpu(arch), Gpu(120)]})

    monkeypatch.setattr(configurations, "_core", Core())
    expected = "cpu" if arch is None else f"sm_{arch}"
    assert fc.default_config(128) == fc.default_config(128, arch=expected)
    assert fc.default_backward_config(128) == fc.default_backward_config(128, arch=expected)
