"""Fine-tunes a model of Hugging Face transformers with flashcute's attention.

    python examples/finetune_transformers.py
    python examples/finetune_transformers.py --largest 99 --steps 3000 --width 256 --layers 4     # on a GPU

The model is a small Llama with random weights, so nothing is downloaded; ``from_pretrained`` takes the same
``attn_implementation``. It learns sums such as "7+5=12;". Prints the loss as it falls, and how many new sums the
model gets right. The exit code is 1 if the loss did not fall.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch
from flashcute.integrations.transformers import register
from transformers import LlamaConfig, LlamaForCausalLM

CHARACTERS = "0123456789+=;"


def encoded(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


def decoded(tokens: list[int]) -> str:
    return "".join(CHARACTERS[token] for token in tokens)


def sums(count: int, largest: int, chance: random.Random) -> str:
    pairs = [(chance.randint(0, largest), chance.randint(0, largest)) for _ in range(count)]
    return "".join(f"{a}+{b}={a + b};" for a, b in pairs)


def batch(rows: int, length: int, largest: int, chance: random.Random) -> torch.Tensor:
    """(rows, length): the sums of a row follow each other, so no row needs padding."""
    return torch.tensor([encoded(sums(length, largest, chance)[:length]) for _ in range(rows)])


def make_model(device: str, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=CHARACTERS.index(";"),
        pad_token_id=CHARACTERS.index(";"),
        attn_implementation="fcute",
    )
    return LlamaForCausalLM(config).to(device)


def train(model: LlamaForCausalLM, options: argparse.Namespace) -> list[float]:
    chance = random.Random(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    on_gpu = model.device.type == "cuda"
    losses = []
    for step in range(options.steps):
        tokens = batch(options.batch, options.length, options.largest, chance).to(model.device)
        # Weights stay float32; attention gets bfloat16, as under any mixed precision.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.3f}", flush=True)
    return losses


def right_answers(model: LlamaForCausalLM, count: int, largest: int, seed: int) -> int:
    """Of sums by generation. Prompts of one length at a time: no padding, so kernels do all."""
    chance = random.Random(-seed - 1)
    found = 0
    for _ in range(count):
        asked, _, answer = sums(1, largest, chance).partition("=")
        prompt = torch.tensor([encoded(asked + "=")], device=model.device)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(answer),
            do_sample=False,
        )
        found += decoded(tokens[0, prompt.shape[1] :].tolist()) == answer
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="characters in a row")
    parser.add_argument("--largest", type=int, default=9, help="number in a sum")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    register()  # the one line that flashcute adds; attn_implementation="fcute" is the other
    torch.manual_seed(options.seed)
    model = make_model(options.device, options.width, options.layers)
    losses = train(model, options)

    asked = 20
    found = right_answers(model.eval(), asked, options.largest, options.seed)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {found} of {asked} new sums are right")
    return 0 if losses[-1] < losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
