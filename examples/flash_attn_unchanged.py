"""A program that knows flash-attn 2 and not flashcute. A model learns to repeat the first half of a sequence.

    python -m flashcute.compat examples/flash_attn_unchanged.py     # with flashcute, on a CPU or GPU
    python examples/flash_attn_unchanged.py                         # with flash-attn, on a GPU

Prints the loss as it trains; a model that repeats perfectly has the loss 0, one that guesses log(16) = 2.77.
"""

import argparse

import flash_attn
import torch
from flash_attn import flash_attn_qkvpacked_func
from torch import nn

SYMBOLS, LENGTH = 16, 32  # the second half of a sequence repeats the first


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        half = qkv if qkv.dtype != torch.float32 else qkv.bfloat16()  # flash-attn takes 16 bits
        attended = flash_attn_qkvpacked_func(half, causal=True, window_size=(-1, -1))
        x = x + self.out(attended.to(x.dtype).flatten(2))
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    def __init__(self, width=64, heads=4, layers=2):
        super().__init__()
        self.symbol, self.position = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, x):
        position = torch.arange(x.shape[1], device=x.device)
        return self.head(self.blocks(self.symbol(x) + self.position(position)))


def loss_of(model, batch, device):
    first = torch.randint(SYMBOLS, (batch, LENGTH // 2), device=device)
    sequence = torch.cat((first, first), 1)
    logits = model(sequence[:, :-1])[:, LENGTH // 2 - 1 :]  # of the symbols that repeat
    return nn.functional.cross_entropy(logits.flatten(0, 1), first.flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print(f"flash_attn {flash_attn.__version__} from {flash_attn.__file__}")
    for step in range(arguments.steps):
        loss = loss_of(model, arguments.batch, device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
