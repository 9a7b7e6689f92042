"""What the functions do where no kernel serves a call."""

from __future__ import annotations

from .._core import ArgumentError

on_unsupported = "error"


def configure(*, on_unsupported: str) -> None:
    """Sets, for this process, what flash-attn's functions do with dropout or a missing gradient, which no kernel
    of flashcute covers yet.

    on_unsupported: "error" (the default) raises UnsupportedError. "warn" and "silent" call torch's
        scaled_dot_product_attention, with or without a warning, as `flash_attention` does; it may need memory for
        seqlen_q * seqlen_k scores and gives no log-sum-exp. Softcap, ALiBi and sinks raise in any case.

    Raises ArgumentError (a ValueError) for other values.
    """
    allowed = ("error", "warn", "silent")
    if on_unsupported not in allowed:
        raise ArgumentError(
            f"on_unsupported: expected 'error', 'warn' or 'silent', got {on_unsupported!r}"
        )
    globals()["on_unsupported"] = on_unsupported
