"""The attention of models that people run, as cases of ``bench --preset``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .problem import Case
from .table import format_table


class Preset(NamedTuple):
    """A layer's attention. Where layers differ in their window, both kinds are timed, as for any case with a window."""

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    seqlens: tuple[int, ...]  # the first one is what the CPU gets
    meaning: str  # of the lengths
    window: int | None = None  # keys up to its own that a query sees
    sink: bool = False
    head_dim_v: int | None = None

    def cases(
        self, dtype: str, seqlens: Sequence[int], batch: int | None, tokens: int
    ) -> Iterator[Case]:
        for seqlen in seqlens:
            yield Case(
                batch=batch or max(1, tokens // seqlen),
                heads=self.heads,
                kv_heads=self.kv_heads,
                seqlen_q=seqlen,
                seqlen_k=seqlen,
                head_dim=self.head_dim,
                causal=self.causal,
                dtype=dtype,
                window=None if self.window is None else (self.window - 1, 0),
                head_dim_v=self.head_dim_v,
                sink=self.sink,
            )


# Heads and head dimensions are those of each model's config.json on huggingface.co, windows those of transformers'
# masks, in which a query's own key counts; lengths are of the source that is named.
PRESETS = {
    # meta-llama/Meta-Llama-3-8B, -70B: max_position_embeddings.
    "llama3-8b": Preset(32, 8, 128, True, (2048, 8192), "a prompt; training"),
    "llama3-70b": Preset(64, 8, 128, True, (2048, 8192), "a prompt; training"),
    # Qwen/Qwen3-8B: the stages of training in arXiv 2505.09388, section 3.2.
    "qwen3-8b": Preset(32, 8, 128, True, (4096, 32768), "training; its long contexts"),
    # mistralai/Mistral-7B-v0.1: context_len of table 1 of arXiv 2310.06825; max_position_embeddings. The window is
    # every layer's.
    "mistral-7b": Preset(
        32, 8, 128, True, (8192, 32768), "version 0.1: training; its longest", window=4096
    ),
    # openai/gpt-oss-20b: initial_context_length; a prompt. Every other layer has the window (layer_types), all have
    # sinks (GptOssAttention of transformers).
    "gpt-oss-20b": Preset(
        64, 8, 64, True, (4096, 32768), "before YaRN; a long prompt", window=128, sink=True
    ),
    # google/gemma-3-4b-pt, whose config.json leaves heads to transformers' Gemma3TextConfig: window (five of six
    # layers) and length of training of arXiv 2503.19786; a prompt.
    "gemma3-4b": Preset(8, 4, 256, True, (4096, 32768), "a prompt; training", window=1024),
    # deepseek-ai/DeepSeek-V3: qk_nope_head_dim + qk_rope_head_dim, v_head_dim: keys and values out of their latent
    # form, as in training and prefill. Lengths: arXiv 2412.19437, sections 4.2 and 4.3.
    "deepseek-v3": Preset(
        128, 128, 192, True, (4096, 32768), "training; its long contexts", head_dim_v=128
    ),
    # black-forest-labs/FLUX.1-dev, transformer/config.json: a token for 16 x 16 pixels, and 512 of text.
    "flux-dev": Preset(24, 24, 128, False, (1536, 4608), "images of 512 x 512, 1024 x 1024"),
    # google/siglip-so400m-patch14-384: 27 x 27 patches; hidden_size / num_attention_heads = 72.
    "siglip-so400m": Preset(16, 16, 72, False, (729,), "an image of 384 x 384"),
    # openai/whisper-large-v3, encoder: max_source_positions.
    "whisper-large-v3": Preset(20, 20, 64, False, (1500,), "encoder, 30 seconds of sound"),
    # google-bert/bert-base-uncased: arXiv 1810.04805, appendix A.2.
    "bert-base": Preset(12, 12, 64, False, (128, 512), "training: 90 % of it; the rest"),
}


def listing() -> str:
    """What there is, for people."""
    rows = []
    for name, x in PRESETS.items():
        mask = "causal" if x.causal else "full"
        if x.window is not None:
            mask += f", also window {x.window}"
        if x.sink:
            mask += ", sinks"
        heads = str(x.heads) if x.kv_heads == x.heads else f"{x.heads}/{x.kv_heads}"
        dims = str(x.head_dim) if x.head_dim_v is None else f"{x.head_dim}/{x.head_dim_v}"
        rows.append([name, heads, dims, mask, ", ".join(map(str, x.seqlens)), x.meaning])
    header = ("preset", "heads/kv", "d/d_v", "mask", "lengths", "which are")
    return format_table(header, rows, left=len(header))
