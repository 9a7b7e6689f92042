"""Trains torch's TransformerEncoder twice, with torch's attention and under flashcute.sdpa.activate(), and compares.

    python examples/sdpa_unchanged.py                 # CPU or GPU, some seconds
    python examples/sdpa_unchanged.py --compile

The model is written with torch alone and knows nothing of flashcute: activate() makes flashcute the flash attention
that torch's scaled_dot_product_attention calls. Needs torch 2.11 or later. The exit code is 1 if flashcute computed
nothing, or if the losses differ by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import nullcontext

import flashcute
import flashcute.sdpa
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Model(nn.Module):
    """Predicts the next of `count` symbols."""

    def __init__(self, count: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.symbols = nn.Embedding(count, width)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, count)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.encoder(self.symbols(x), mask=mask, is_causal=True))


def train(options: argparse.Namespace) -> list[float]:
    """The loss of every step. The sequences repeat themselves after 16 symbols."""
    torch.manual_seed(options.seed)
    model = Model(32, options.width, options.heads, options.layers).to(options.device)
    step = torch.compile(model) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(options.steps):
        period = torch.randint(32, (options.batch, 16), device=options.device)
        x = period.repeat(1, options.seqlen // 16 + 1)[:, : options.seqlen + 1]
        with torch.autocast("cuda", torch.bfloat16, enabled=options.device == "cuda"):
            logits = step(x[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="the model by torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    # On Hopper torch prefers cuDNN's attention: chosen here is flash attention, for both runs.
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if options.device == "cuda" else nullcontext()
    with flash:
        theirs = train(options)
        before = Counter(flashcute.sdpa.served())
        with flashcute.sdpa.activate(options.device):
            mine = train(options)
    calls = Counter(flashcute.sdpa.served()) - before

    print(f"loss of the first and the last step: torch {theirs[0]:.4f}, {theirs[-1]:.4f}; "
          f"flashcute {mine[0]:.4f}, {mine[-1]:.4f}")  # fmt: skip
    for name, count in sorted(calls.items()):
        print(f"flashcute computed {count} calls of aten::{name}")
    for reason, count in flashcute.sdpa.fallbacks().items():
        print(f"torch computed {count} calls: {reason}")
    # Rounding grows as the weights drift apart; in the beginning a wrong gradient shows at once.
    first = list(zip(theirs, mine, strict=True))[:10]
    rounding = max(abs(a - b) for a, b in first)
    print(f"first {len(first)} steps: losses differ by at most {rounding:.1e}")
    allowed = 1e-4 if options.device == "cpu" else 2e-2
    return 0 if calls and rounding < allowed else 1


if __name__ == "__main__":
    sys.exit(main())
