"""The backward benchmark: gradients of the output alone, with the forward done beforehand; by torch's autograd, or
with a configuration by flashcute.backward."""

from __future__ import annotations

import argparse
from typing import Any, TextIO

from .. import reference
from .bench_forward import Line, Verifier, error_ratio, run_with
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

    def flops(self, case: Case) -> float:
        """Of S again, dQ and dK, which have the head dimension of q, and dP and dV, which have that of v."""
        return 2 * case.counted_pairs * (3 * case.head_dim + 2 * case.value_dim)

    def check(
        self, one: Implementation, case: Case, inputs: Inputs, sink: Array | None
    ) -> tuple[str | None, Line]:
        small = self.small(case)
        key = one.name, small
        if key not in self.checked:
            self.checked[key] = self.on_gradients(one, small)
        return self.checked[key]

    def on_gradients(self, one: Implementation, small: Case) -> tuple[str | None, Line]:
        q, k, v = small.random_inputs(self.kit)
        sink = small.random_sink(self.kit)
        dout = self.kit.normal((*q.shape[:3], small.value_dim), small.dtype)
        dout64, q64, k64, v64 = (self.kit.double(x) for x in (dout, q, k, v))
        masks = small.causal, small.window, sink
        expected = reference.naive_gradients(
            dout64, q64, k64, v64, small.causal, window=small.window,
            sink=None if sink is None else self.kit.double(sink),
        )  # fmt: skip
        rough = self.gradients(Naive(self.kit), (q, k, v), dout, *masks)
        found = self.gradients(one, (q, k, v), dout, *masks)
        line: Line = {}
        ratios: list[float] = []
        names = NAMES if sink is None else (*NAMES, "dsink")
        for name, *arrays in zip(names, found, rough, expected, strict=True):
            got, naive, ref = (Result(self.kit.to_numpy(x), None) for x in arrays)
            mine, bound = errors(got, ref), errors(naive, ref)
            line[f"{name}_max_error"], line[f"{name}_rel_l2"] = mine.max_error, mine.rel_l2
            ratios.append(error_ratio(mine, bound) or 0.0)
            line["error_ratio"] = max(ratios)
            wrong = complaint(mine, bound, ref, small.dtype)
            if wrong is not None:
                return f"{small.label}, {name}: {wrong}", line
        return None, line

    def gradients(
        self,
        one: Implementation,
        inputs: Inputs,
        dout: Array,
        causal: bool,
        window: Window,
        sink: Array | None,
    ) -> tuple[Array, ...]:
        """As bshd, which inputs and dout are; that of the sink comes last."""
        swapped = one.layout != "bshd"
        if swapped:
            dout = self.kit.swap_heads(dout)
        inputs = in_layout(self.kit, inputs, one.layout)
        found: Any = self.call_with(one, inputs, causal, window, sink, dout)()
        if not swapped:
            return tuple(found)
        return (*(self.kit.swap_heads(x) for x in found[:3]), *found[3:])

    def timed_call(
        self, one: Implementation, inputs: Inputs, sink: Array | None, case: Case
    ) -> Call:
        shape = (*inputs[0].shape[:3], case.value_dim)
        dout = self.kit.normal(shape, case.dtype)
        return self.call_with(one, inputs, case.causal, case.window, sink, dout)

    def call_with(
        self,
        one: Implementation,
        inputs: Inputs,
        causal: bool,
        window: Window,
        sink: Array | None,
        dout: Array,
    ) -> Call:
        """The gradients for `dout`, which is in the implementation's layout too."""
        if isinstance(one, FlashcuteGradients) and one.changes:
            return one.gradients(inputs, causal, window, sink, dout)
        torch: Any = self.kit.torch  # type: ignore[attr-defined]
        q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
        if sink is not None:
            leaves.append(sink.detach().requires_grad_())
            sink = leaves[-1]
        with self.kit.on_capture_stream():  # autograd works on the stream of the forward
            out = one.call(q, k, v, causal, window=window, sink=sink)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
