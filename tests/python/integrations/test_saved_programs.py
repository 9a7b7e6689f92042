"""Programs that were saved when the operators had fewer arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from conftest import Runner, environment

# The operators as they were first, without flashcute: what its Python code of today adds to a call cannot creep in.
SAVE = """
import warnings
import torch
warnings.simplefilter("ignore")


FORWARD = "(Tensor q, Tensor k, Tensor v, bool causal, float? scale, str layout, bool allow_tf32) -> (Tensor, Tensor)"
BACKWARD = (
    "(Tensor? dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, bool causal, float? scale,"
    " str layout) -> (Tensor, Tensor, Tensor)"
)

def forward(q, k, v, causal, scale, layout, allow_tf32):
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])

def backward(dout, q, k, v, out, lse, dlse, causal, scale, layout):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

for name, function, schema in (("forward", forward, FORWARD), ("backward", backward, BACKWARD)):
    made = torch.library.custom_op(f"flashcute::flash_attention_{name}", function, mutates_args=(), schema=schema)
    made.register_fake(function)
assert len(torch.ops.flashcute.flash_attention_forward.default._schema.arguments) == 7
assert len(torch.ops.flashcute.flash_attention_backward.default._schema.arguments) == 10

class Step(torch.nn.Module):
    def forward(self, q, k, v):
        out, lse = torch.ops.flashcute.flash_attention_forward(q, k, v, True, 0.3, "bshd", False)
        gradients = torch.ops.flashcute.flash_attention_backward(
            2 * out, q, k, v, out, lse, None, True, 0.3, "bshd"
        )
        return (out, lse, *gradients)

tensors = tuple(torch.zeros(2, rows, heads, 16) for rows, heads in ((5, 4), (7, 2), (7, 2)))
torch.export.save(torch.export.export(Step(), tensors), "exported.pt2")
torch.jit.trace(Step(), tensors, check_trace=False).save("traced.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with programs of the first operators."""
    folder = tmp_path_factory.mktemp("saved")
    done = subprocess.run(
        [sys.executable, "-c", SAVE], env=environment(), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["exported.pt2", "traced.pt"])
def test_programs_with_the_first_arguments_load(saved: Path, fresh: Runner, name: str) -> None:
    """An argument that was added without a default, in the middle, or with a default that means something else: the
    program does not load, or computes something else."""
    fresh(
        f"""
        import warnings
        import flashcute, torch
        from flashcute import reference
        warnings.simplefilter("ignore")
        path = {str(saved / name)!r}
        program = torch.jit.load(path) if path.endswith(".pt") else torch.export.load(path).module()
        tensors = [torch.randn(2, rows, heads, 16) for rows, heads in ((5, 4), (7, 2), (7, 2))]
        wide = [x.double() for x in tensors]
        out, lse = reference.naive(*wide, True, scale=0.3, return_lse=True)
        expected = (out, lse, *reference.naive_gradients(2 * out, *wide, True, scale=0.3))
        for found, exact in zip(program(*tensors), expected, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
        """
    )


FIRST = {
    "forward": "q k v causal scale layout allow_tf32",
    "backward": "dout q k v out lse dlse causal scale layout",
    "backward_with_sink": "dout q k v out lse dlse sink causal scale layout",
}
APPENDED = "diagonal deterministic window_left window_right seqlens_q seqlens_k prefix prefixes"


@pytest.mark.parametrize("operator", FIRST)
def test_arguments_are_appended_with_defaults(operator: str) -> None:
    """Programs give the first arguments by position, and no others; those that were saved later, more of them."""
    first = FIRST[operator]
    import flashcute  # noqa: F401 (registers the operators)

    schema = getattr(torch.ops.flashcute, f"flash_attention_{operator}").default._schema
    names = [argument.name for argument in schema.arguments]
    known = first.split()
    assert names[: len(known)] == known
    assert all(argument.has_default_value() for argument in schema.arguments[len(known) :])
    assert not any(argument.kwarg_only for argument in schema.arguments)
    later = APPENDED.split() + (["sink"] if operator == "forward" else [])
    assert names[len(known) :][: len(later)] == later


# With the arguments that the operators had when they knew windows.
SAVE_WINDOWS = SAVE.replace(
    "bool allow_tf32)",
    "bool allow_tf32, SymInt? diagonal=None, bool? deterministic=None, SymInt? window_left=None,"
    " SymInt? window_right=None)",
).replace(
    '" str layout)',
    '" str layout, SymInt? diagonal=None, bool? deterministic=None, SymInt? window_left=None,"\n'
    '    " SymInt? window_right=None)',
)
SAVE_WINDOWS = (
    SAVE_WINDOWS.replace("layout, allow_tf32):", "layout, allow_tf32, *more):")
    .replace("scale, layout):", "scale, layout, *more):")
    .replace('"bshd", False)', '"bshd", False, 1, None, 3, 0)')
    .replace('True, 0.3, "bshd"\n', 'True, 0.3, "bshd", 1, True, 3, 0\n')
    .replace("== 7", "== 11")
    .replace("== 10", "== 14")
)


@pytest.mark.parametrize("name", ["exported.pt2", "traced.pt"])
def test_programs_with_windows_load(tmp_path: Path, fresh: Runner, name: str) -> None:
    """As the first ones."""
    subprocess.run(
        [sys.executable, "-c", SAVE_WINDOWS], env=environment(), cwd=tmp_path, check=True
    )
    fresh(
        f"""
        import warnings
        import flashcute, torch
        from flashcute import reference
        warnings.simplefilter("ignore")
        path = {str(tmp_path / name)!r}
        program = torch.jit.load(path) if path.endswith(".pt") else torch.export.load(path).module()
        tensors = [torch.randn(2, rows, heads, 16) for rows, heads in ((5, 4), (7, 2), (7, 2))]
        wide = [x.double() for x in tensors]
        given = {{"scale": 0.3, "diagonal": 1, "window": (3, 0)}}
        out, lse = reference.naive(*wide, True, **given, return_lse=True)
        expected = (out, lse, *reference.naive_gradients(2 * out, *wide, True, **given))
        for found, exact in zip(program(*tensors), expected, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
        """
    )
