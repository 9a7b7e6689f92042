"""The road of eager calls that record gradients."""

from __future__ import annotations

from typing import Any

from .._call import Options, run
from .framework import Tensor, torch
from .gradients import decided, gradients, gradients_on_stream, no_second_derivative
from .operators import backward_by_operator
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
        options: Options,
        return_lse: bool,
    ) -> Any:
        out, lse = run(None, q, k, v, decided(options, gradients_follow=True), return_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        found = (None, None, None)
        if dout is not None or dlse is not None:
            tensors = (dout, *ctx.saved_tensors, dlse)
            if is_observed(dout, dlse):  # a batch of gradients, a counter of FLOPs
                found = gradients_on_stream(backward_by_operator, *tensors, options=ctx.options)
            elif torch.is_grad_enabled():
                found = Gradients.apply(ctx.options, *tensors)
            else:
                found = gradients_on_stream(gradients, *tensors, options=ctx.options)
        return (*found, None, None)
