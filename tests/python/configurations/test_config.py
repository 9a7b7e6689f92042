"""ForwardConfig as a value, and what tells which configurations there are."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import pickle
import re
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from conftest import Runner
from hypothesis import given, settings
from hypothesis import strategies as st
from optional_torch import torch

OPTIONS = {
    "dtype": ["float16", "bfloat16", "float32", "float64"],
    "head_dim": [1, 64, 72, 128, 256],
    "head_dim_v": [1, 64, 128, 256],
    "block_m": [16, 64, 128],
    "block_n": [16, 32, 128],
    "num_warps": [1, 2, 4, 8],
    "kernel": ["sm80", "sm90"],
    "blocks_per_sm": [1, 2, 3],
    "math": ["tensor_core", "tf32x3", "cuda_core"],
    "stages": [1, 2],
    "copy_bytes": [2, 4, 8, 16],
    "async_copy": [True, False],
    "eager_load_blocks": [True, False],
    "swizzled": [True, False],
    "q_in_registers": [True, False],
    "k_tiles_per_load": [0, 1, 2],
    "mma_double_buffer": [True, False],
    "optimized_softmax": [True, False],
    "rescale_threshold": [0, 1, 8],
    "pingpong": [True, False],
    "overlap": [True, False],
    "stale_max": [True, False],
    "scores_ahead": [True, False],
    "late_store": [True, False],
    "cluster": [1, 2],
}
any_config = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in OPTIONS.items()}).map(
    lambda options: fc.ForwardConfig(**options)
)


def options_of(cfg: fc.ForwardConfig) -> dict[str, object]:
    return {name: getattr(cfg, name) for name in OPTIONS}


# ---- a value -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_kept(name: str) -> None:
    """Every option that is given comes back, with its type, and changes no other."""
    default = options_of(fc.ForwardConfig())
    for value in OPTIONS[name]:
        got = options_of(fc.ForwardConfig(**{name: value}))
        follows = {"head_dim_v": value} if name == "head_dim" else {}
        assert got == {**default, name: value, **follows}
        assert type(got[name]) is type(value)


@pytest.mark.parametrize("name", [*OPTIONS, "name", "something_new"])
def test_immutable(name: str) -> None:
    """A configuration that is a key in somebody's dict cannot change."""
    cfg = fc.ForwardConfig()
    before = repr(cfg)
    with pytest.raises(AttributeError):
        setattr(cfg, name, 64)
    with pytest.raises(AttributeError):
        delattr(cfg, name)
    assert repr(cfg) == before


@pytest.mark.filterwarnings("ignore:nanobind. attempted to initialize")
def test_init_does_not_change_a_finished_value() -> None:
    """Nor by calling __init__ again."""
    cfg = fc.ForwardConfig()
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever; what counts is the next line
        cfg.__init__(head_dim=64)  # type: ignore[misc]
    assert cfg == fc.ForwardConfig()


def test_an_array_is_no_number(fresh: Runner) -> None:
    """An array's class has __index__, which fails: the process crashed. In one of its own."""
    done = fresh("""
        import flashcute as fc, numpy as np
        for wrong in (np.array([1, 2]), np.array(1.0), np.zeros(0, int)):
            try:
                fc.ForwardConfig(block_m=wrong)
            except fc.ArgumentError as error:
                print(error)
        print(fc.ForwardConfig(block_m=np.array(64)).block_m)
    """)
    *refused, accepted = done.stdout.splitlines()
    assert [line.partition(", got ")[0] for line in refused] == ["block_m: expected an integer"] * 3
    assert accepted == "64"


@given(any_config, any_config)
def test_equality_and_hash(a: fc.ForwardConfig, b: fc.ForwardConfig) -> None:
    """Equal exactly if all options are equal; then the hashes are equal too."""
    assert (a == b) == (options_of(a) == options_of(b))
    assert (a != b) == (options_of(a) != options_of(b))
    twin = fc.ForwardConfig(**options_of(a))
    assert twin == a
    assert hash(twin) == hash(a)
    assert len({a, twin, a.replace()}) == 1


@pytest.mark.parametrize("other", [None, 0, "fwd", (), fc.ForwardConfig, object()], ids=repr)
def test_not_equal_to_other_things(other: object) -> None:
    """Comparing with anything is an answer, not an error."""
    assert fc.ForwardConfig() != other
    assert not fc.ForwardConfig() == other  # noqa: SIM201 - both operators are under test


@given(any_config)
def test_repr_evaluates_back(cfg: fc.ForwardConfig) -> None:
    """What a log shows can be pasted."""
    assert eval(repr(cfg), {"ForwardConfig": fc.ForwardConfig}) == cfg


@given(any_config)
def test_repr_shows_what_differs_from_the_default(cfg: fc.ForwardConfig) -> None:
    """Twenty options of which eighteen say nothing hide the two that do. The dtype, the width and the tile are always
    there."""
    shown = dict(re.findall(r"(\w+)=([^,)]+)", repr(cfg)))
    assert shown == {
        name: repr(value)
        for name, value in options_of(cfg).items()
        if name in ("dtype", "head_dim", "block_m", "block_n")
        or value != (cfg.head_dim if name == "head_dim_v" else getattr(fc.ForwardConfig(), name))
    }


def test_errors_show_what_the_rule_is_about() -> None:
    """A rule that breaks on a default is told with that default, and without those that it does not name."""
    with pytest.raises(fc.ConfigError) as raised:
        fc.ForwardConfig(block_m=48, swizzled=False).check("sm_80")
    assert str(raised.value) == (
        "cfg: block_m must be a positive multiple of 16 * num_warps, at most 256 (got dtype='bfloat16', head_dim=128, "
        "block_m=48, block_n=64, num_warps=4, swizzled=False; GPU of compute capability 8.0)"
    )
    with pytest.raises(fc.ConfigError) as raised:
        fc.BackwardConfig(block_m=24, swizzled=False).check("cpu")
    assert "block_m=24" in str(raised.value)
    assert "swizzled" not in str(raised.value)  # the CPU ignores it


def test_options_of_another_kernel_are_named() -> None:
    """An experiment that switches what the kernel does not have, and measures nothing."""
    with pytest.raises(fc.ConfigError) as raised:
        fc.default_config(128, "bfloat16", "sm_90").replace(swizzled=False, cluster=2).check(
            "sm_90"
        )
    message = str(raised.value)
    assert message.startswith("cfg: an option that only another kernel reads must have its default")
    assert "cluster=2: swizzled; GPU" in message


def test_the_cpu_runs_any_configuration(rng: np.random.Generator) -> None:
    """A rule of a GPU kernel that refuses a call on the CPU, which reads none of these options."""
    q, k, v = (rng.standard_normal((1, 40, 2, 64)).astype(np.float16) for _ in range(3))
    expected = fc.flash_attention(q, k, v, causal=True)
    base = fc.ForwardConfig(dtype="float16", head_dim=64)
    changes: list[dict[str, Any]] = [
        {"num_warps": 3},
        {"stages": 7, "copy_bytes": 3, "blocks_per_sm": 0},
        {"block_m": 48, "rescale_threshold": 99, "math": "tf32x3"},
        {"kernel": "sm90", "swizzled": False},
    ]
    of_the_gpus = [c for c in fc.configs() if (c.dtype, c.head_dim) == ("float16", 64)]
    assert {c.kernel for c in of_the_gpus} == {"sm80", "sm90"}
    for cfg in [*of_the_gpus, *(base.replace(**change) for change in changes)]:
        out = fc.forward(cfg, q, k, v, causal=True)
        assert np.abs(out.astype(np.float32) - expected.astype(np.float32)).max() < 2e-3, cfg
    pairs = base.replace(kernel="sm90", block_m=16, cluster=2)
    assert fc.count_blocks(pairs, q, k, v).shape == (1, 2, 3, 3)
    gradients = fc.BackwardConfig(
        dtype="float16", head_dim=64, num_warps=3, column_warps=9, copy_bytes=0
    )
    lse = np.zeros((1, 2, 40), np.float32)
    for gradient in fc.backward(gradients, q, q, k, v, expected, lse, causal=True):
        assert gradient.shape == q.shape


@given(any_config, any_config)
def test_replace(a: fc.ForwardConfig, b: fc.ForwardConfig) -> None:
    """A changed copy; the original is as it was."""
    before = repr(a)
    assert a.replace(**options_of(b)) == b
    one = a.replace(block_n=b.block_n)
    assert options_of(one) == {**options_of(a), "block_n": b.block_n}
    assert repr(a) == before


@given(any_config)
@settings(max_examples=20)
def test_pickle_and_copy(cfg: fc.ForwardConfig) -> None:
    """Values travel to worker processes, in every protocol that classes without __dict__ have,
    and into deep copies."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(cfg, protocol)) == cfg
    assert copy.copy(cfg) == cfg
    assert copy.deepcopy({"cfg": [cfg]}) == {"cfg": [cfg]}


def test_pickle_is_read_by_another_process(fresh: Runner) -> None:
    """The class is found by its public name in a process that has not imported flashcute yet."""
    cfg = fc.ForwardConfig(dtype="float16", head_dim=72, q_in_registers=True)
    done = fresh(f"import pickle; print(repr(pickle.loads({pickle.dumps(cfg)!r})))")
    assert done.stdout.strip() == repr(cfg)


@pytest.mark.parametrize(
    "state", [(), ("float16",), (*range(7),), ("float16", 64, 64, 64, 4, True, False, 1)]
)
def test_foreign_pickles_are_refused(fresh: Runner, state: tuple) -> None:
    """A pickle of a version with other options is an error, not a configuration of garbage; nor
    a crash, for which the process of its own is there."""
    done = fresh(f"""
        import flashcute as fc
        blank = fc.ForwardConfig.__new__(fc.ForwardConfig)
        try:
            blank.__setstate__({state!r})
        except (fc.FlashcuteError, TypeError, ValueError, IndexError) as error:
            print("refused")
        else:
            print("accepted", blank)
    """)
    assert done.stdout.strip() == "refused"


def test_final() -> None:
    """A subclass would not be the C++ value that the kernels are looked up by."""
    with pytest.raises(TypeError):
        type("Mine", (fc.ForwardConfig,), {})


# ---- options that are wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [fc.ForwardConfig, fc.ForwardConfig().replace], ids=["new", "replace"]
)
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("blockm", 64, r"^ForwardConfig: expected options among dtype, .*cluster, got 'blockm'"),
        ("head_dim", "64", r"^head_dim: expected an integer, got '64'"),
        ("head_dim", 64.0, r"^head_dim: expected an integer, got 64.0"),
        ("head_dim", True, r"^head_dim: expected an integer, got True"),
        ("head_dim", None, r"^head_dim: expected an integer, got None"),
        ("block_m", 2**31, r"^block_m: expected an integer.*, got 2147483648"),
        ("num_warps", -(2**40), r"^num_warps: expected an integer.*, got -1099511627776"),
        ("swizzled", 1, r"^swizzled: expected True or False, got 1"),
        ("math", "fast", r"^math: expected 'tensor_core', 'tf32x3' or 'cuda_core', got 'fast'"),
        ("math", 1, r"^math: expected 'tensor_core', 'tf32x3' or 'cuda_core', got 1"),
        ("q_in_registers", "no", r"^q_in_registers: expected True or False, got 'no'"),
        ("dtype", "int8", r"^dtype: expected float16, bfloat16, float32 or float64, got 'int8'"),
        ("dtype", "half", r"^dtype: expected float16, .* got 'half'"),
        ("dtype", None, r"^dtype: expected float16, .* got None"),
        ("dtype", 16, r"^dtype: expected float16, .* got 16"),
        ("dtype", torch.int8, r"^dtype: expected float16, .* got torch.int8"),
    ],
)  # fmt: skip
def test_wrong_options(make: type, option: str, value: object, says: str) -> None:
    """Unknown names and wrong types are named, with what is allowed."""
    with pytest.raises(fc.ArgumentError, match=says):
        make(**{option: value})


def test_options_are_keywords() -> None:
    """Positions would change their meaning with the next option."""
    with pytest.raises(TypeError):
        fc.ForwardConfig("float16")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("float16", "float16"),
        (torch.float16, "float16"),
        (torch.half, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float32, "float32"),
        (torch.float64, "float64"),
        (np.float16, "float16"),
        (np.dtype("float32"), "float32"),
        (np.float64, "float64"),
        (np.dtype(">f4"), "float32"),
    ],
    ids=repr,
)
def test_dtype_objects(spelled: object, name: str) -> None:
    """A dtype object of torch or NumPy is as good as its name."""
    assert fc.ForwardConfig(dtype=spelled).dtype == name
    assert fc.default_config(64, spelled, "cpu").dtype == name


@pytest.mark.parametrize(
    ("module", "attribute"),
    [("ml_dtypes", "bfloat16"), ("jax.numpy", "bfloat16"), ("cupy", "float16")],
)
def test_dtype_objects_of_other_libraries(module: str, attribute: str) -> None:
    """So are theirs."""
    pytest.importorskip(module)
    spelled = getattr(importlib.import_module(module), attribute)
    assert fc.ForwardConfig(dtype=spelled).dtype == attribute
    assert fc.ForwardConfig(dtype=np.dtype(spelled)).dtype == attribute


# ---- names ---------------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    """Two configurations with one name would share a kernel. All that differ from each other in
    two options are named."""
    names: dict[str, fc.ForwardConfig] = {}
    for a, b in itertools.combinations(OPTIONS, 2):
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b]):
            cfg = fc.ForwardConfig(**{"head_dim_v": 128, a: x, b: y})
            assert names.setdefault(cfg.name, cfg) == cfg
    assert len(names) > 400
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)


def test_head_dim_v_follows_head_dim() -> None:
    """Who sets one head dim means both, unless they differ already."""
    cfg = fc.ForwardConfig(head_dim=64)
    assert cfg.head_dim_v == 64
    assert cfg.replace(head_dim=128).head_dim_v == 128
    apart = cfg.replace(head_dim_v=32)
    assert apart.head_dim == 64
    assert apart.replace(head_dim=128).head_dim_v == 32


def test_name_is_canonical() -> None:
    """Names are in caches, logs and benchmark results: they do not change by accident."""
    cfg = fc.ForwardConfig(dtype="bfloat16", head_dim=128, block_m=128, block_n=64, num_warps=4)
    assert cfg.name == "fwd_bf16_d128_m128_n64_w4"
    cfg = cfg.replace(dtype="float16", swizzled=False, q_in_registers=True)
    assert cfg.name == "fwd_f16_d128_m128_n64_w4_unswizzled_qreg"
    cfg = cfg.replace(
        head_dim_v=64, blocks_per_sm=3, math="cuda_core", copy_bytes=4, async_copy=False, eager_load_blocks=False,
        swizzled=True, q_in_registers=False, k_tiles_per_load=2, mma_double_buffer=False,
        optimized_softmax=False, stages=2, rescale_threshold=0,
    )  # fmt: skip
    assert cfg.name == (
        "fwd_f16_d128_dv64_m128_n64_w4_b3_cudacore_st2_copy4_sync_lazy_k2_single_textbook_tau0"
    )
    hoppers = fc.default_config(128, "bfloat16", "sm_90")
    assert hoppers.name == "fwd_bf16_d128_m128_n128_w8_sm90_st3"
    hoppers = hoppers.replace(pingpong=False, overlap=False, stale_max=False, cluster=2)
    assert hoppers.name == "fwd_bf16_d128_m128_n128_w8_sm90_st3_noturns_serial_freshmax_cluster2"
    ahead = fc.default_config(64, "bfloat16", "sm_90")
    assert ahead.name == "fwd_bf16_d64_m192_n64_w12_sm90_st4_noturns_ahead"


@given(st.integers(-(2**31), 2**31 - 1))
def test_any_integer_has_a_name(number: int) -> None:
    """A name is also shown for a configuration that breaks a rule: in full, whatever its numbers
    are."""
    cfg = fc.ForwardConfig(head_dim=number, block_m=number)
    assert f"_d{number}_m{number}_" in cfg.name


# ---- which there are -----------------------------------------------------------------------------


def test_configs() -> None:
    """Each is of its own, keeps the rules on every GPU that it is for, and the caller's list is the caller's."""
    found = fc.configs()
    assert len(set(found)) == len(found) > 0
    for cfg in found:
        every = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
        for arch in ("sm_90",) if cfg.kernel == "sm90" else every:
            cfg.check(arch)
    assert {(c.dtype, c.head_dim) for c in found} >= {
        (dtype, d) for dtype in ("float16", "bfloat16", "float32") for d in (64, 128, 256)
    }
    found.clear()
    assert fc.configs()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", 100, "sm_120"])
def test_gpu_defaults_are_ahead_of_time(dtype: str, arch: str | int) -> None:
    """Every head dim that flash_attention takes runs without a compiler. (In float16 a wider tile of Hopper's kernel
    stands in for those of 96, 160 and 192: test_choice.cpp.)"""
    widths = (
        (64, 96, 128, 160, 192, 256) if arch == "sm_90" and dtype != "float32" else (64, 128, 256)
    )
    for d in range(8, 257, 8):
        cfg = fc.default_config(d, dtype, arch)
        stands_in = dtype == "float16" and cfg.head_dim in (96, 160, 192)
        assert (cfg in fc.configs()) != stands_in
        assert cfg.head_dim == min(width for width in widths if width >= d)
        assert fc.default_config(8, dtype, arch, head_dim_v=d) == cfg


@pytest.mark.parametrize(
    ("d", "d_v", "width", "width_v"),
    [(192, 128, 192, 128), (160, 96, 192, 128), (128, 192, 192, 192), (200, 128, 256, 256)],
)
def test_values_may_have_a_width_of_their_own(d: int, d_v: int, width: int, width_v: int) -> None:
    """Products with V that are computed as wide as those of Q and K."""
    cfg = fc.default_config(d, "bfloat16", "sm_90", head_dim_v=d_v)
    assert (cfg.head_dim, cfg.head_dim_v) == (width, width_v)
    assert cfg in fc.configs()


@pytest.mark.parametrize("dtype", OPTIONS["dtype"])
@pytest.mark.parametrize("arch", ["cpu", "sm_80", "sm_90"])
def test_default_config_is_one_that_runs_or_an_error(dtype: str, arch: str) -> None:
    """No head dim falls through to a kernel that is too narrow, no dtype to one that does not
    exist."""
    for d in range(1, 258):
        try:
            cfg = fc.default_config(d, dtype, arch)
        except (fc.ArgumentError, fc.UnsupportedError):
            continue
        cfg.check(arch)
        assert cfg.head_dim >= d
        assert cfg.dtype == dtype


@pytest.mark.parametrize("d", [0, -8, 257, 2**40])
def test_default_config_of_impossible_head_dims(d: int) -> None:
    """Named, with the range."""
    with pytest.raises(fc.ArgumentError, match=rf"^head_dim: expected .*1 and 256, got {d}"):
        fc.default_config(d)


@pytest.mark.parametrize("d", ["64", 64.0, None], ids=repr)
def test_default_config_of_the_wrong_type(d: object) -> None:
    """Named like every other argument."""
    with pytest.raises((fc.ArgumentError, TypeError), match=r"^head_dim: expected .*got"):
        fc.default_config(d)  # type: ignore[arg-type]


# ---- explain -------------------------------------------------------------------------------------


def test_explain_names_what_is_wrong() -> None:
    """If nothing can run the call, the reason is the message of the exception that the call
    raises."""
    q = torch.ones(1, 4, 2, 8)
    k = torch.ones(1, 4, 3, 8)
    told = fc.explain(q, k, k)
    assert told.backend == ""
    assert told.config is None
    assert told.kernel == ""
    with pytest.raises(fc.ArgumentError) as raised:
        fc.flash_attention(q, k, k)
    assert dict(told.rejected)["cpu"] == str(raised.value)
    assert "nothing can run this call" in repr(told)
    assert str(raised.value) in repr(told)


def test_explain_takes_what_the_call_takes() -> None:
    """An argument that a call has and explain lacks: what it changes is not explained."""
    arguments = inspect.signature(fc.flash_attention).parameters
    for name, argument in inspect.signature(fc.explain).parameters.items():
        expected = arguments.get(name, argument)
        assert (argument.default, argument.kind) == (expected.default, expected.kind), name
    assert arguments.keys() <= inspect.signature(fc.explain).parameters.keys()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"out": np.ones((1, 4, 2, 7), np.float32)}, "out: expected shape"),
        ({"stream": 7}, "stream: expected None for arrays on the CPU"),
        ({"out": torch.ones(1, 4, 2, 8, requires_grad=True)}, "out: gradients"),
        ({"dropout_p": 0.5, "return_lse": True}, "dropout_p=0.5 is not supported yet"),
    ],
)
def test_explain_refuses_what_the_call_refuses(given: dict[str, Any], says: str) -> None:
    """The reason is the message of the exception, whichever argument is wrong."""
    q = np.ones((1, 4, 2, 8), np.float32)
    with pytest.raises(fc.FlashcuteError) as raised:
        fc.flash_attention(q, q, q, **given)
    told = fc.explain(q, q, q, **given)
    assert told.backend == ""
    assert told.rejected[0][1] == str(raised.value) or ("cpu", str(raised.value)) in told.rejected
    assert str(raised.value).startswith(says)


def test_explain_a_chosen_configuration() -> None:
    """It explains the configuration that was asked for, and refuses one that forward would
    refuse."""
    q = torch.ones(1, 4, 2, 8)
    cfg = fc.default_config(8, "float32", "cpu").replace(block_m=128)
    told = fc.explain(q, q, q, cfg=cfg)
    assert told.config == cfg
    assert repr(cfg) in repr(told)
    told = fc.explain(q, q, q, cfg=cfg.replace(dtype="float16"))
    assert told.backend == ""
    assert "dtype float16 does not fit" in dict(told.rejected)["cpu"]


def test_explain_lists_every_ahead_of_time_configuration() -> None:
    """Each that was not taken has its reason, once."""
    q = torch.ones(1, 4, 2, 64, dtype=torch.float16)
    told = fc.explain(q, q, q)
    names = [what for what, _ in told.rejected]
    assert len(set(names)) == len(names)
    assert {c.name for c in fc.configs()} - {told.config.name} <= set(names)
    reasons = dict(told.rejected)
    for cfg in fc.configs():
        if cfg.dtype == "bfloat16":
            assert "dtype bfloat16 does not fit" in reasons[cfg.name]
    # Also where nothing was chosen: no configuration may count as the chosen one.
    flat = torch.ones(4, 2, 64, dtype=torch.bfloat16)
    assert {c.name for c in fc.configs()} <= dict(fc.explain(flat, flat, flat).rejected).keys()


def test_explain_on_the_cpu_shows_what_the_cpu_uses() -> None:
    """Options of the GPU kernels say nothing there, even where they are not the default."""
    q = torch.ones(1, 4, 2, 8)
    cfg = fc.default_config(8, "float32", "cpu").replace(swizzled=False, num_warps=1)
    told = fc.explain(q, q, q, cfg=cfg)
    assert told.config == cfg
    assert "config  ForwardConfig(dtype='float32', head_dim=8, block_m=64, block_n=128)\n" in repr(
        told
    )
    assert told.reasons == ["The tensors are on the CPU.", "cfg asks for this configuration."]


def test_explain_says_why_also_where_gradients_are_recorded() -> None:
    """An explanation that is made anew, with a note on gradients, and loses its reasons, or the gradients'."""
    q = torch.ones(1, 4, 2, 8, requires_grad=True)
    told = fc.explain(q, q, q)
    assert told.reasons == told.gradients.reasons == ["The tensors are on the CPU."]
    assert told.notes == []
    assert len(told.gradients.notes) == 1
    assert {c.name for c in fc._core.backward_configs()} <= dict(told.gradients.rejected).keys()


def test_explain_tells_of_gradients_where_it_is_asked() -> None:
    """Of arrays of a library that records none, for which `backward` computes them."""
    q = np.ones((1, 4, 2, 8), np.float32)
    assert fc.explain(q, q, q).gradients is None
    told = fc.explain(q, q, q, gradients=True)
    assert told.gradients.backend == "cpu"
    assert told.gradients.config == fc.default_backward_config(8, "float32", "cpu")
    assert told.gradients.kernels == [(told.kernel, told.image)]
    assert told.gradients.same_bits
    assert told.gradients.workspace_bytes == 0
    assert repr(told).endswith(repr(told.gradients))
    assert fc.explain(q, q, q[:, :3], gradients=True).gradients is None


def test_explain_prints_one_line_for_each_reason() -> None:
    """A line for each of dozens of configurations: what matters scrolls away."""
    q = torch.ones(1, 4, 2, 8)
    for told in (fc.explain(q, q, q), fc.explain(q, q, torch.ones(1, 4, 3, 8))):
        lines = repr(told).partition("  not taken\n")[2].splitlines()
        reasons = list(dict.fromkeys(reason for _, reason in told.rejected))
        assert all(line.endswith(f": {why}") for line, why in zip(lines, reasons, strict=True))
        assert len(lines) < 6 < len(told.rejected)
        counted = sum(
            int(n) for n in re.findall(r"(\d+) ahead-of-time configurations: ", repr(told))
        )
        assert counted == sum(what.startswith("fwd_") for what, _ in told.rejected)


# ---- what explains, and facts, as values ---------------------------------------------------------


def facts() -> dict[str, object]:
    """By the name that a test has of them."""
    q = np.ones((1, 4, 2, 8), np.float32)
    gpu = fc._core.GpuInfo.__new__(fc._core.GpuInfo)  # no machine without a GPU gives one
    gpu.__setstate__((1, "NVIDIA H100", 90))
    assert repr(gpu) == "GpuInfo(index=1, name='NVIDIA H100', arch=90)"
    driver = fc._core.DriverInfo.__new__(fc._core.DriverInfo)
    driver.__setstate__((True, "", 13000, [gpu]))
    assert driver.gpus == [gpu]
    return {
        "gpu": gpu,
        "driver with a gpu": driver,
        "explanation": fc.explain(q, q, q),
        "explanation of an error": fc.explain(q, q, q[..., :3]),
        "explanation with gradients": fc.explain(q, q, q, gradients=True),
        "explanation of gradients": fc.explain(q, q, q, gradients=True).gradients,
        "driver": fc._core.driver_info(),
        "build": fc._core.build_info(),
    }


@pytest.mark.parametrize("name", facts())
def test_facts_are_values(name: str) -> None:
    """An explanation that cannot be sent to another process, logged by a deep copy, or compared."""
    fact = facts()[name]
    twins = [copy.copy(fact), copy.deepcopy([fact])[0], facts()[name]]
    twins += [pickle.loads(pickle.dumps(fact, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for twin in twins:
        assert twin is not fact
        assert twin == fact
        assert hash(twin) == hash(fact)
        assert repr(twin) == repr(fact)
    assert len({fact, *twins}) == 1
    assert fact != repr(fact)
    assert fact not in [other for key, other in facts().items() if key != name]


def test_explanations_differ_in_every_member() -> None:
    """Equality that forgets a member; a pickle that mixes two up."""
    q = np.ones((1, 4, 2, 8), np.float32)
    members = {
        "backend": "sm90",
        "config": fc.ForwardConfig(),
        "kernel": "k",
        "image": "i",
        "rejected": [("cpu", "why")],
        "notes": ["n"],
        "reasons": ["r"],
        "gradients": fc.explain(q, q, q, gradients=True).gradients,
    }
    told = fc.Explanation(**members)
    again = pickle.loads(pickle.dumps(told))
    assert {name: getattr(again, name) for name in members} == members
    other = {
        "backend": "cpu",
        "config": None,
        "kernel": "",
        "image": "",
        "rejected": [],
        "notes": [],
        "reasons": [],
        "gradients": None,
    }
    for name in members:
        assert fc.Explanation(**{**members, name: other[name]}) != told, name
    assert set(members) == {n for n in dir(fc.Explanation) if not n.startswith("_")}


def test_explanations_of_gradients_differ_in_every_member() -> None:
    """As above."""
    members = {
        "backend": "sm80",
        "config": fc.BackwardConfig(),
        "kernels": [("k", "i")],
        "workspace_bytes": 3,
        "same_bits": True,
        "rejected": [("cpu", "why")],
        "notes": ["n"],
        "reasons": ["r"],
    }
    told = fc.BackwardExplanation(**members)
    again = pickle.loads(pickle.dumps(told))
    assert {name: getattr(again, name) for name in members} == members
    for name, value in members.items():
        other = None if name == "config" else type(value)()
        assert fc.BackwardExplanation(**{**members, name: other}) != told, name
    assert set(members) == {n for n in dir(fc.BackwardExplanation) if not n.startswith("_")}


@pytest.mark.parametrize("kind", [fc.FlashcuteError, *fc.FlashcuteError.__subclasses__()])
def test_exceptions_travel(kind: type[fc.FlashcuteError]) -> None:
    """Out of a process pool, with what somebody added to them."""
    error = kind("q: expected this, got that")
    error.shape = (2, 3)  # type: ignore[attr-defined]
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert twin.shape == (2, 3)


def test_explain_does_not_run_or_change_anything() -> None:
    """It reads shapes, not data."""
    q = torch.full((1, 4, 2, 8), float("nan"))
    q.requires_grad_()
    assert fc.explain(q, q, q).backend == "cpu"
    assert bool(q.isnan().all())
