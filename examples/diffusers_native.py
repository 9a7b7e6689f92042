"""Runs a diffusion transformer of diffusers, whose attention backend is "native", on flashcute's kernels.

    pip install diffusers
    python examples/diffusers_native.py               # CPU or GPU, some seconds; downloads nothing

The model is a small Flux transformer with random weights. "native" is torch's scaled_dot_product_attention, so
flashcute.sdpa.activate() reaches it and nothing of diffusers is changed. Needs torch 2.11 or later. The exit code is 1
if flashcute computed nothing or something else than torch, 2 if diffusers is not installed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import flashcute
import flashcute.sdpa
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def small_flux(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model, and random arguments: an image of size x size latents, and 32 embeddings of a text."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(options.seed)
    like = {
        "device": options.device,
        "dtype": torch.float32 if options.device == "cpu" else torch.bfloat16,
    }
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    pixels, words = options.size**2, 32
    places = torch.zeros(pixels, 3)
    places[:, 1] = torch.arange(pixels) // options.size
    places[:, 2] = torch.arange(pixels) % options.size
    arguments = {
        "hidden_states": torch.randn(1, pixels, 16).to(**like),
        "encoder_hidden_states": torch.randn(1, words, 64).to(**like),
        "pooled_projections": torch.randn(1, 32).to(**like),
        "timestep": torch.tensor([0.5]).to(**like),
        "img_ids": places.to(options.device),
        "txt_ids": torch.zeros(words, 3, device=options.device),
    }
    return model.to(**like).eval(), arguments


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=32, help="latents in a row of the image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if find_spec("diffusers") is None:
        print("this example needs diffusers: pip install diffusers", file=sys.stderr)
        return 2

    model, arguments = small_flux(options)
    model.set_attention_backend("native")
    # On Hopper torch prefers cuDNN's attention: chosen here is flash attention, for both runs.
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if options.device == "cuda" else nullcontext()
    with torch.no_grad(), flash:
        theirs = model(**arguments).sample
        before = Counter(flashcute.sdpa.served())
        with flashcute.sdpa.activate(options.device):
            mine = model(**arguments).sample
    calls = sum((Counter(flashcute.sdpa.served()) - before).values())

    error = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
    print(f"flashcute computed {calls} attentions of {options.size**2 + 32} tokens")
    print(f"the output differs from that of torch's attention by {error:.1e} of its norm")
    return 0 if calls and error < (1e-5 if options.device == "cpu" else 3e-2) else 1


if __name__ == "__main__":
    sys.exit(main())
