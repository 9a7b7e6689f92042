"""The backward benchmark: gradients of the output alone, with the forward done beforehand; by torch's autograd, or
with a configuration by flashcute.backward."""

from __future__ import annotations

import argparse
from typing import Any, TextIO

from .. import reference
from .bench_forward import Line, Verifier, run_with
from .kits import Array, Call, Inputs, Kit, in_layout
from .options import UsageError
from .peers import DETERMINISTIC, FlashcuteGradients, Implementation, Naive
from .problem import Case, Result, Window, complaint, errors

NAMES = ("dq", "dk", "dv")


def run(options: argparse.Namespace, out: TextIO | None) -> int:
    return run_with(BackwardVerifier, options, out)


class BackwardVerifier(Verifier):
    """All of the gradients of a small problem, by the accuracy rule of outputs, each."""

    kind = "backward"
    products = (
        5  # S and dP again, dQ, dK, dV; half of all pairs under a causal mask, as in the forward
    )

    def __init__(self, kit: Kit) -> None:
        if kit.library != "torch":
            raise UsageError(
                "--backward: gradients are compared by torch's autograd: install torch"
            )
        super().__init__(kit)
        self.checked: dict[tuple[str, Case], tuple[str | None, Line]] = {}

    def implementation(self, name: str) -> Implementation:
        if name == "flashcute":
            return FlashcuteGradients(self.kit)
        if name == DETERMINISTIC:
            return FlashcuteGradients(self.kit, {"deterministic": True}, name)
        return super().implementation(name)

    def changed(self, changes: dict[str, Any]) -> Implementation:
        return FlashcuteGradients(self.kit, changes)

    def check(self, one: Implementation, case: Case, inputs: Inputs) -> tuple[str | None, Line]:
        small = self.small(case)
        key = one.name, small
        if key not in self.checked:
            self.checked[key] = self.on_gradients(one, small)
        return self.checked[key]

    def on_gradients(self, one: Implementation, small: Case) -> tuple[str | None, Line]:
        q, k, v = small.random_inputs(self.kit)
        dout = self.kit.normal(q.shape, small.dtype)
        dout64, q64, k64, v64 = (self.kit.double(x) for x in (dout, q, k, v))
        masks = small.causal, small.window
        expected = reference.naive_gradients(
            dout64, q64, k64, v64, small.causal, window=small.window
        )
        rough = self.gradients(Naive(self.kit), (q, k, v), dout, *masks)
        found = self.gradients(one, (q, k, v), dout, *masks)
        line: Line = {}
        for name, *arrays in zip(NAMES, found, rough, expected, strict=True):
            got, naive, ref = (Result(self.kit.to_numpy(x), None) for x in arrays)
            mine = errors(got, ref)
            line[f"{name}_max_error"], line[f"{name}_rel_l2"] = mine.max_error, mine.rel_l2
            wrong = complaint(mine, errors(naive, ref), ref, small.dtype)
            if wrong is not None:
                return f"{small.label}, {name}: {wrong}", line
        return None, line

    def gradients(
        self, one: Implementation, inputs: Inputs, dout: Array, causal: bool, window: Window
    ) -> tuple[Array, ...]:
        """As bshd, which inputs and dout are."""
        swapped = one.layout != "bshd"
        if swapped:
            dout = self.kit.swap_heads(dout)
        inputs = in_layout(self.kit, inputs, one.layout)
        found: Any = self.call_with(one, inputs, causal, window, dout)()
        return tuple(self.kit.swap_heads(x) for x in found) if swapped else found

    def timed_call(self, one: Implementation, inputs: Inputs, case: Case) -> Call:
        dout = self.kit.torch.randn_like(inputs[0])  # type: ignore[attr-defined]
        return self.call_with(one, inputs, case.causal, case.window, dout)

    def call_with(
        self, one: Implementation, inputs: Inputs, causal: bool, window: Window, dout: Array
    ) -> Call:
        """The gradients for `dout`, which is in the implementation's layout too."""
        if isinstance(one, FlashcuteGradients) and one.changes:
            return one.gradients(inputs, causal, window, dout)
        torch: Any = self.kit.torch  # type: ignore[attr-defined]
        q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
        with self.kit.on_capture_stream():  # autograd works on the stream of the forward
            out = one.call(q, k, v, causal, window=window)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
