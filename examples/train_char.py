"""Trains a small character-level transformer twice, with flashcute's attention and with torch's, and compares.

    python examples/train_char.py                 # CPU or GPU, about a minute on two cores
    python examples/train_char.py --steps 1000 --plot loss.png

Both runs start from the same weights and see the same batches, so their losses differ by rounding alone. The text
is this repository's own documentation. Shows progress with tqdm and draws the loss curves with matplotlib where
these are installed. The exit code is 1 if the first losses differ by more than rounding, or the last by more
than noise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import flashcute
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- the two attentions: (batch, seqlen, heads, head_dim) in and out -----------------------------


def flashcute_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flashcute.flash_attention(q, k, v, causal=True)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


# ---- the model -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        # (batch, seqlen, 3, heads, head_dim): q, k and v are views, which need no copies.
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm_2(x))


class CharacterModel(nn.Module):
    def __init__(
        self,
        characters: int,
        context: int,
        width: int,
        heads: int,
        layers: int,
        attention: Attention,
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attention) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        return self.head(self.norm(self.blocks(self.characters(text) + self.positions(places))))


# ---- training ------------------------------------------------------------------------------------


def read_text() -> str:
    pages = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(ROOT.glob("docs/**/*.md"))]
    return "\n".join(page.read_text() for page in pages)


def progress(steps: int, label: str) -> Iterator[int]:
    if find_spec("tqdm") is not None:
        from tqdm import tqdm

        numbers: Iterable[int] = tqdm(range(steps), desc=label)
        yield from numbers
        return
    for step in range(steps):
        yield step
        filled = 30 * (step + 1) // steps
        print(f"\r{label:>10} [{'#' * filled:30}] {step + 1}/{steps}", end="", file=sys.stderr)
    print(file=sys.stderr)


def train(name: str, attention: Attention, options: argparse.Namespace) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(options.seed)
    text = read_text()
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    data = torch.tensor([number[character] for character in text], device=options.device)
    model = CharacterModel(
        len(alphabet), options.context, options.width, options.heads, options.layers, attention
    ).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    batches = torch.Generator().manual_seed(options.seed)
    window = torch.arange(options.context + 1, device=options.device)
    losses = []
    for _ in progress(options.steps, name):
        starts = torch.randint(
            len(data) - options.context, (options.batch, 1), generator=batches
        ).to(options.device)
        batch = data[starts + window]
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def draw(losses: dict[str, list[float]], file: Path) -> None:
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(values, style, label=name)
    axes.set(
        xlabel="step", ylabel="loss (nats per character)", title="the same training, two attentions"
    )
    axes.legend()
    figure.savefig(file)
    print(f"loss curves: {file}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128, help="characters that the model sees")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, default=Path("train_char.svg"), metavar="FILE")
    options = parser.parse_args()

    losses: dict[str, list[float]] = {}
    for name, attention in (("flashcute", flashcute_attention), ("torch", torch_attention)):
        start = time.perf_counter()
        losses[name] = train(name, attention, options)
        print(
            f"{name}: {time.perf_counter() - start:.1f} s, loss {losses[name][-1]:.4f}", flush=True
        )
    draw(losses, options.plot)

    # Noise is what the loss varies by from batch to batch at the end of training.
    last = max(2, options.steps // 10)
    ends = {name: values[-last:] for name, values in losses.items()}
    mean = {name: statistics.fmean(values) for name, values in ends.items()}
    difference = abs(mean["flashcute"] - mean["torch"])
    noise = statistics.stdev(ends["torch"])
    print(
        f"mean loss of the last {last} steps: flashcute {mean['flashcute']:.4f}, torch {mean['torch']:.4f}; "
        f"difference {difference:.1e}, noise {noise:.1e}"
    )
    # Rounding grows as the weights drift apart; in the beginning wrong gradients show at once.
    pairs = list(zip(losses["flashcute"], losses["torch"], strict=True))[:20]
    rounding = max(abs(mine - theirs) for mine, theirs in pairs)
    print(f"first {len(pairs)} steps: losses differ by at most {rounding:.1e}")
    return 0 if difference <= noise and rounding < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
