"""flashcute.compat.install: what `import flash_attn` and importlib.metadata find, what is refused, what is left after.
In fresh processes: a module that is imported, or a finder, would stay."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import Runner
from optional_torch import needs_torch


def package(folder: Path, name: str, distribution: str = "", version: str = "1.0") -> None:
    """A package that can be imported, and the distribution that it comes from."""
    path = folder / name.replace(".", "/")
    path.mkdir(parents=True)
    (path / "__init__.py").write_text(f"__version__ = {version!r}\n")
    if distribution:
        metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (metadata / "METADATA").write_text(text)
        (metadata / "top_level.txt").write_text(f"{name}\n")


# What was there before install, to compare with. Packages made in the current folder are found.
PRELUDE = """
import importlib, importlib.metadata, importlib.util, sys
import flashcute.compat
from flashcute import ArgumentError, UnsupportedError

def state():
    return list(sys.meta_path), [x for x in sys.modules if x.partition(".")[0] == "flash_attn"]

def refused(what, **options):
    before = state()
    try:
        flashcute.compat.install(**options)
    except UnsupportedError as error:
        assert str(error).startswith("install: " + what), error
    else:
        raise AssertionError("not refused")
    assert state() == before

before = state()
"""


# ---- what is there --------------------------------------------------------------------------------------


def test_nothing_without_install(fresh: Runner) -> None:
    """A name that flashcute takes by being imported; torch, which takes a second, for nothing."""
    fresh("""
        import flashcute, flashcute.compat, importlib.util, sys
        assert importlib.util.find_spec("flash_attn") is None
        assert "flash_attn" not in sys.modules
        assert "torch" not in sys.modules
    """)
    fresh("""
        import sys, flashcute
        assert "flashcute.compat" not in sys.modules
    """)


@needs_torch
def test_imports(fresh: Runner) -> None:
    """A module that is found but not loaded, or the other way round; a spec of None, which find_spec answers with
    ValueError; a submodule that PathFinder finds in flashcute's own folder: that of flash-attn 3."""
    fresh(
        PRELUDE
        + """
handle = flashcute.compat.install(version="2.7.4.post1")
assert importlib.util.find_spec("flash_attn").submodule_search_locations == []
assert importlib.util.find_spec("flash_attn.bert_padding") is not None
import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import flash_attn_func as same, _flash_attn_forward
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
assert flash_attn.__version__ == "2.7.4.post1"
assert flash_attn_func is same is flashcute.compat.flash_attn.flash_attn_func
assert flash_attn.__spec__.name == flash_attn.__name__ == "flash_attn"
assert flash_attn.bert_padding.__package__ == "flash_attn"
assert flashcute.compat.flash_attn.__name__ == "flashcute.compat.flash_attn"
assert importlib.reload(flash_attn).flash_attn_func is same
import pickle
assert pickle.loads(pickle.dumps(flash_attn_func)) is same
"""
    )


@needs_torch
def test_what_is_missing_is_named(fresh: Runner) -> None:
    """A package that takes its rotary embedding from flash-attn; torch, which asks for flash-attn 4."""
    fresh(
        PRELUDE
        + """
flashcute.compat.install()
import flash_attn
for name in ("flash_attn.layers.rotary", "flash_attn.ops", "flash_attn.cute", "flash_attn.flash_attn"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert ".".join(name.split(".")[:2]) in str(error)
    else:
        raise AssertionError(name)
assert importlib.util.find_spec("flash_attn.cute") is None
try:
    from flash_attn import flash_attn_gpu
except ImportError as error:
    assert "flash_attn_gpu" in str(error) and "flashcute" in str(error)
"""
    )


def test_metadata(fresh: Runner) -> None:
    """A version that one question answers and another does not: transformers asks for the version, and then which
    distribution has the package."""
    fresh(
        PRELUDE
        + """
mapping = importlib.metadata.packages_distributions
with flashcute.compat.install():
    assert "flash_attn" not in mapping()
    try:
        importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise AssertionError("a distribution without metadata=True")
with flashcute.compat.install("2.8.1", metadata=True):
    for name in ("flash-attn", "flash_attn", "Flash.Attn"):
        assert importlib.metadata.version(name) == "2.8.1"
    assert mapping()["flash_attn"] == ["flash-attn"]
    found = importlib.metadata.distribution("flash-attn")
    assert found.metadata["Name"] == "flash-attn" and found.files is None and not found.requires
    assert [x for x in importlib.metadata.distributions() if x.metadata["Name"] == "flash-attn"]
    # As pip asks: what lies in these folders?
    assert not list(importlib.metadata.distributions(path=["."], name="flash-attn"))
    assert importlib.metadata.version("numpy") and importlib.metadata.entry_points() is not None
assert "flash_attn" not in mapping()
"""
    )


@needs_torch
def test_remove_leaves_no_trace(fresh: Runner) -> None:
    """A finder, a module or an attribute that stays; functions that end with it; a second remove that fails."""
    fresh(
        PRELUDE
        + """
import torch
handle = flashcute.compat.install(metadata=True)
from flash_attn.bert_padding import pad_input
from flash_attn import flash_attn_func
handle.remove()
handle.remove()
assert state() == before
assert importlib.util.find_spec("flash_attn") is None
try:
    import flash_attn
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("still there")
x = torch.ones(1, 4, 1, 8)
assert torch.equal(flash_attn_func(x, x, x), x)

try:
    with flashcute.compat.install():
        import flash_attn.bert_padding
        1 / 0
except ZeroDivisionError:
    pass
assert state() == before

# A module that took the name since is not ours to remove.
import types
handle = flashcute.compat.install()
other = sys.modules["flash_attn"] = types.ModuleType("flash_attn")
handle.remove()
assert sys.modules["flash_attn"] is other
"""
    )


# ---- what is refused -------------------------------------------------------------------------------------


def test_versions(fresh: Runner) -> None:
    """A version of flash-attn 3 or 4, whose functions these are not."""
    fresh(
        PRELUDE
        + """
for version in ("3.0.0", "4.0.0b2", "2", "2.", "latest", 2.8, None):
    try:
        flashcute.compat.install(version)
    except ArgumentError as error:
        assert str(error).startswith("version: expected") and repr(version) in str(error)
    else:
        raise AssertionError(version)
assert state() == before
flashcute.compat.install("2.6.3").remove()
flashcute.compat.install("2.8.0rc1").remove()
"""
    )


def test_twice(fresh: Runner) -> None:
    fresh(
        PRELUDE
        + """
handle = flashcute.compat.install()
refused("flashcute is installed as flash_attn already")
handle.remove()
flashcute.compat.install()
"""
    )


@pytest.mark.parametrize("distribution", ["flash-attn", "flash-attn-4", ""])
def test_installed_flash_attn(fresh: Runner, tmp_path: Path, distribution: str) -> None:
    """One that is hidden without a word; that of version 4, which shares the folder; one without metadata."""
    package(tmp_path, "flash_attn", distribution, "9.9")
    fresh(PRELUDE + 'refused("flash-attn is installed: replace=True")')


def test_installed_distribution_alone(fresh: Runner, tmp_path: Path) -> None:
    """Its metadata, which are asked first."""
    package(tmp_path, "other", "flash-attn")
    fresh(PRELUDE + 'refused("flash-attn is installed: replace=True", metadata=True)')


@needs_torch
def test_replace(fresh: Runner, tmp_path: Path) -> None:
    package(tmp_path, "flash_attn", "flash-attn", "9.9")
    fresh(
        PRELUDE
        + """
with flashcute.compat.install(metadata=True, replace=True):
    import flash_attn
    assert flash_attn.__version__ == "2.8.3"
    assert importlib.metadata.version("flash-attn") == "2.8.3"
assert state() == before
import flash_attn
assert flash_attn.__version__ == importlib.metadata.version("flash-attn") == "9.9"
refused("flash_attn is imported already", replace=True)
"""
    )


@pytest.mark.parametrize("consumer", ["transformers", "diffusers", "megatron.core"])
def test_consumer_that_has_looked(fresh: Runner, tmp_path: Path, consumer: str) -> None:
    """An install without effect: these packages keep the answer."""
    package(tmp_path, consumer)
    fresh(
        PRELUDE
        + f"""
flashcute.compat.install().remove()  # findable is no hindrance
import {consumer}
refused("{consumer} is imported already")
"""
    )


@pytest.mark.parametrize(("name", "shown"), [("xformers", "xFormers"), ("vllm", "vLLM")])
def test_consumer_that_would_break(fresh: Runner, tmp_path: Path, name: str, shown: str) -> None:
    """An import of theirs that fails, as it found flash_attn and not what it needs of it."""
    package(tmp_path, name)
    fresh(
        PRELUDE
        + f"""
refused("{shown} can be imported, and would fail")
refused("{shown} can be imported, and would fail", replace=True)
"""
    )
    # Put there by hand, without a spec.
    fresh(
        f'import sys, types; sys.modules["{name}"] = types.ModuleType("{name}")\n'
        + PRELUDE
        + f'refused("{shown} can be imported, and would fail")'
    )


def test_transformer_engine(fresh: Runner, tmp_path: Path) -> None:
    """It asks for the distribution alone."""
    package(tmp_path, "transformer_engine")
    fresh(
        PRELUDE
        + """
refused("metadata: Transformer Engine can be imported, and would fail", metadata=True)
flashcute.compat.install()
"""
    )


# ---- the command -------------------------------------------------------------------------------------------

PROGRAM = """
import sys, flash_attn, importlib.metadata, pathlib
assert __name__ == "__main__" and sys.argv[1:] == ["--steps", "3"]
import beside
try:
    found = importlib.metadata.version("flash-attn")
except importlib.metadata.PackageNotFoundError:
    found = None
print(flash_attn.__version__, found)
sys.exit(3)
"""


@needs_torch
def test_command(fresh: Runner, tmp_path: Path) -> None:
    """Arguments of the program that the command takes; a module beside it that is not found; its exit status."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "beside.py").touch()
    run = """
import runpy, sys
sys.argv[1:] = {}
runpy.run_module("flashcute.compat", run_name="__main__", alter_sys=True)
"""
    for before, expected in (([], "2.8.3 None"), (["--metadata"], "2.8.3 2.8.3")):
        arguments = [*before, "folder/program.py", "--steps", "3"]
        done = fresh(run.format(arguments), check=False)
        assert (done.returncode, done.stdout.strip()) == (3, expected), done.stderr
    for arguments in ([], ["--help"]):
        done = fresh(run.format(arguments), check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("usage: python -m flashcute.compat")


# ---- transformers ------------------------------------------------------------------------------------------

TRANSFORMERS = """
import copy
import flashcute.compat
flashcute.compat.install(metadata=True)
import torch
device = "{device}"
if device == "cpu":
    torch.cuda.is_available = lambda: True  # transformers takes flash-attn on a GPU alone
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal
assert is_flash_attn_2_available()
assert is_flash_attn_greater_or_equal("2.8.3") and not is_flash_attn_greater_or_equal("2.8.4")
import flash_attn
import flashcute.compat._attention as attention
calls = []
compute = attention.flash_attention
def counted(*args, **kwargs):
    calls.append(args[0].shape)
    return compute(*args, **kwargs)
attention.flash_attention = counted

config = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=97, max_position_embeddings=256,
)

def model(kind, dtype):
    own = copy.deepcopy(config)  # which remembers the kind
    return LlamaForCausalLM._from_config(own, attn_implementation=kind, dtype=dtype).to(device)

torch.manual_seed(0)
eager = model("eager", torch.float64)
flash, narrow = model("flash_attention_2", torch.bfloat16), model("eager", torch.bfloat16)
for other in (flash, narrow):
    other.load_state_dict(eager.state_dict())
eager.load_state_dict(flash.state_dict())  # the same rounded weights
tokens = torch.randint(0, 97, (2, 21), device=device)
exact, found, rough = (m(input_ids=tokens, labels=tokens) for m in (eager, flash, narrow))
assert calls == [(2, 21, 4, 16)] * 2, calls
error, allowed = ((x.logits.double() - exact.logits).abs().max() for x in (found, rough))
assert error <= 2 * allowed, (error, allowed)
found.loss.backward(); exact.loss.backward(); rough.loss.backward()
for (name, x), y, z in zip(flash.named_parameters(), eager.parameters(), narrow.parameters(), strict=True):
    error, allowed = ((g.grad.double() - y.grad).norm() for g in (x, z))
    assert error <= 2 * allowed + 2**-8 * y.grad.norm(), (name, error, allowed)
with torch.no_grad():
    assert torch.isfinite(flash.generate(tokens, max_new_tokens=4, do_sample=False).double()).all()
"""


@needs_torch
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_flash_attention_2(fresh: Runner, device: str) -> None:
    """An unchanged `attn_implementation="flash_attention_2"`: found, called, and right, with gradients, and with a
    cache when it generates."""
    fresh(TRANSFORMERS.format(device=device), HF_HUB_OFFLINE="1")


@needs_torch
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_finds_the_sinks(fresh: Runner, device: str) -> None:
    """A name in the signature that transformers does not look for: then it drops sinks without a word."""
    fresh(
        f"""
        import flashcute.compat
        flashcute.compat.install(metadata=True)
        import flashcute, torch
        torch.cuda.is_available = lambda: True
        from transformers import modeling_flash_attention_utils as flash
        dtype = torch.float32 if "{device}" == "cpu" else torch.bfloat16
        q, k, v = (torch.randn(2, 5, h, 16).to("{device}", dtype) for h in (4, 2, 2))
        sink = torch.randn(4).to("{device}", dtype)
        flash.lazy_import_flash_attention("flash_attention_2")
        found = flash._flash_attention_forward(
            q, k, v, None, 5, is_causal=True, softmax_scale=0.3, sliding_window=2, s_aux=sink,
            attn_implementation="flash_attention_2",
        )
        meant = flashcute.flash_attention(q, k, v, causal=True, window=(1, 0), sink=sink, scale=0.3)
        assert torch.equal(found, meant)
        """,
        HF_HUB_OFFLINE="1",
    )
