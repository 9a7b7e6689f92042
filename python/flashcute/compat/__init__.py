"""flash-attn's functions, computed by flashcute: for programs that were written for flash-attn 2 or 3.

    from flashcute.compat.flash_attn import flash_attn_func              # flash-attn 2.8
    from flashcute.compat.flash_attn_interface import flash_attn_func    # flash-attn 3
    from flashcute.compat.bert_padding import pad_input, unpad_input

`install` lets `import flash_attn` find the first and the third, so that a program needs no change.
docs/guides/from_flash_attn.md lists every function and argument, and where flashcute differs.
"""

from __future__ import annotations

from ._install import Handle, install
from ._settings import configure

__all__ = ["Handle", "configure", "install"]
