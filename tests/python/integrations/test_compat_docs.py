"""The pages for those who come from other libraries, against the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from conftest import Runner
from optional_torch import REASON, needs_torch

GUIDES = Path(__file__).parents[3] / "docs" / "guides"


def test_every_function_and_argument_is_named() -> None:
    """An argument that a reader looks up in vain."""
    fa2 = pytest.importorskip("flashcute.compat.flash_attn", reason=REASON, exc_type=ImportError)
    fa3 = pytest.importorskip("flashcute.compat.flash_attn_interface", reason=REASON)
    padding = pytest.importorskip("flashcute.compat.bert_padding", reason=REASON)
    text = (GUIDES / "from_flash_attn.md").read_text()
    named = set(re.findall(r"`(\w+)`", text))
    assert named >= {*fa2.__all__, *fa3.__all__, *padding.__all__}
    functions = [getattr(fa, name) for fa in (fa2, fa3) for name in fa.__all__]
    functions = [
        f for f in functions if f.__name__.startswith("flash_attn_") and "combine" not in f.__name__
    ]
    arguments = {name for f in functions for name in inspect.signature(f).parameters}
    assert arguments <= named


@needs_torch
def test_equivalents_of_other_masks(fresh: Runner) -> None:
    """A window off by one, a mask aligned to the wrong key, in the tables: against FlexAttention and the definitions
    of xFormers' masks."""
    fresh("""
        import flashcute, torch
        from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

        rows, keys, w = 9, 12, 3
        shapes = (2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 16)
        q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        shift = keys - rows
        masks = {  # what flashcute is told, and xFormers' or FlexAttention's definition
            "upper left": (dict(causal=True, diagonal="start"), lambda i, j: i >= j),
            "bottom right": (dict(causal=True), lambda i, j: i + shift >= j),
            "offset": (dict(causal=True, diagonal=5), lambda i, j: i + 5 >= j),
            "empty rows": (dict(causal=True, diagonal=-4), lambda i, j: i - 4 >= j),
            "local": (dict(window=(1, 2)), lambda i, j: (i - 1 <= j - shift) & (j - shift <= i + 2)),
            "causal local": (
                dict(causal=True, window=(w - 1, 0)), lambda i, j: (i + shift >= j) & (i + shift - j < w)
            ),
            "prefix": (dict(causal=True, diagonal="start", prefix=5), lambda i, j: (i >= j) | (j < 5)),
            "lengths": (dict(seqlens_k=torch.tensor([7, 7], dtype=torch.int32)), lambda i, j: j < 7),
            "causal lengths": (
                dict(causal=True, diagonal="start", seqlens_k=torch.tensor([7, 7], dtype=torch.int32)),
                lambda i, j: (i >= j) & (j < 7),
            ),
        }
        for name, (options, seen) in masks.items():
            def mask_mod(b, h, i, j):
                return seen(i, j)
            block_mask = create_block_mask(mask_mod, None, None, rows, keys, device="cpu")
            expected, lse = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True, return_lse=True)
            found = flashcute.flash_attention(
                q, k, v, layout="bhsd", on_unsupported="error", return_lse=True, **options
            )
            torch.testing.assert_close(found[0], expected, msg=name)
            torch.testing.assert_close(found[1].float(), lse.float(), msg=name)
            mask = create_mask(mask_mod, 1, 1, rows, keys, device="cpu")
            written_out = flashcute.flash_attention(q, k, v, layout="bhsd", on_unsupported="silent", attn_mask=mask)
            torch.testing.assert_close(written_out, expected, msg=name)

        sink = torch.randn(4, dtype=torch.float64)
        plain, lse = flex_attention(q, k, v, enable_gqa=True, return_lse=True)
        expected = plain * torch.sigmoid(lse - sink[:, None])[..., None]
        found = flashcute.flash_attention(q, k, v, layout="bhsd", sink=sink)
        torch.testing.assert_close(found, expected)

        # (B, M, G, H, K): keys that are expanded over H.
        q, k = torch.randn(2, 7, 2, 3, 16), torch.randn(2, 7, 2, 1, 16).expand(2, 7, 2, 3, 16)
        found = flashcute.flash_attention(q.flatten(2, 3), k[:, :, :, 0], k[:, :, :, 0]).unflatten(2, (2, 3))
        for g in range(2):
            alone = flashcute.flash_attention(q[:, :, g], k[:, :, g], k[:, :, g])
            torch.testing.assert_close(found[:, :, g], alone)
    """)
