"""The road of eager calls that record gradients."""

from __future__ import annotations

from typing import Any

from .._call import Options, run
from .framework import Tensor, torch
from .gradients import (
    decided,
    gradients,
    gradients_on_stream,
    no_second_derivative,
    with_tensors,
    without_tensors,
)
from .operators import backward_by_operator
from .problem import require_tensors
from .tracing import is_observed


class Gradients(torch.autograd.Function):  # type: ignore[misc]
    """`gradients` where they are recorded in turn (create_graph=True): as a constant they would make a loss that
    depends on them silently wrong."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor | None) -> Any:
        return gradients_on_stream(gradients, *tensors, options=options)

    backward = staticmethod(no_second_derivative)


class FlashAttention(torch.autograd.Function):  # type: ignore[misc]
    """The eager road."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        options: Options,
        return_lse: bool,
    ) -> Any:
        """The sink is also in the options; here it is what autograd computes a gradient of."""
        out, lse = run(None, q, k, v, decided(options, gradients_follow=True), return_lse=True)
        ctx.options, tensors = without_tensors(options)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        found: tuple[Tensor | None, ...] = (None, None, None)
        if dout is not None or dlse is not None:
            saved = ctx.saved_tensors
            options = with_tensors(ctx.options, saved[5:])
            tensors = (dout, *saved[:5], dlse)
            if is_observed(dout, dlse):  # a batch of gradients, a counter of FLOPs
                require_tensors(options)
                found = gradients_on_stream(backward_by_operator, *tensors, options=options)
            elif torch.is_grad_enabled():
                found = Gradients.apply(options, *tensors)
            else:
                found = gradients_on_stream(gradients, *tensors, options=options)
        dsink = found[3] if len(found) > 3 and ctx.needs_input_grad[3] else None
        return (*found[:3], dsink, None, None)
