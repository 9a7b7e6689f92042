"""Times a training step of the layers of a Llama of a billion parameters, by each attention, and attention's share.

    python benchmarks/python/llama_step.py --out benchmarks/results/gpu_llama_step.jsonl
    python benchmarks/python/llama_step.py --device cpu --tiny      # whether it runs at all

The layers are those of Llama 3.2 1B (16 of 2,048 columns; 32 query heads for 8 of 64 columns), or with --head-dim 128
the same with half of the heads. Weights and inputs are random, in bfloat16, and a step is the forward and the backward
of 8,192 tokens, without embeddings and an optimizer. The attentions take turns, a step each, on the same weights.
Attention's share is the time of its kernels, by torch's profiler, over that of all kernels of a step.

The attentions: fcute, flashcute; fcute_sm80, the same with gradients by the mma.sync kernels, which Hopper took before
it had its own; cudnn and flash2, torch's SDPA by cuDNN and by FlashAttention-2. The exit code is 1 if the gradients of
the inputs differ from those of another attention by more than bfloat16's noise.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flashcute
import torch
import transformers
from flashcute._cli.kits import TorchCpuKit, TorchCudaKit
from flashcute._cli.provenance import provenance
from flashcute.integrations.transformers import register
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

OF_ATTENTION = re.compile(r"flashcute|sdpa|flash_(fwd|bwd)|fmha")  # names of kernels
BACKENDS = {"peer_cudnn": SDPBackend.CUDNN_ATTENTION, "peer_fa2": SDPBackend.FLASH_ATTENTION}
WARM_UP = 3  # steps of each attention, in which kernels are loaded and memory is asked for
NOISE = 0.03  # relative, of gradients behind all layers
Line = dict[str, Any]


# ---- attentions ------------------------------------------------------------------------------------


class MmaSyncGradients(torch.autograd.Function):
    """The default forward; gradients by the kernels of GPUs that have none of their own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        told = flashcute.explain(q, k, v, causal=True)
        out, lse = flashcute.forward(told.config, q, k, v, causal=True, return_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        arch = "sm_100" if q.is_cuda else "cpu"
        cfg = flashcute.default_backward_config(q.shape[-1], q.dtype, arch, deterministic=False)
        return flashcute.backward(cfg, dout.contiguous(), q, k, v, out, lse, causal=True)


def by_mma_sync(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return MmaSyncGradients.apply(*(x.transpose(1, 2) for x in (query, key, value)))


def by_torch(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend if query.is_cuda else SDPBackend.MATH):
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous()


def add_attention(name: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Under a name without "flash", by which transformers would look for a package."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        return attend(query, key, value), None

    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.sdpa_mask)


def add_attentions() -> dict[str, str]:
    """Returns their names in transformers."""
    register(on_unsupported="error")  # a step that torch computes would be measured as ours
    add_attention("peer_mma_sync", by_mma_sync)
    for name, backend in BACKENDS.items():
        add_attention(name, functools.partial(by_torch, backend=backend))
    return {
        "fcute": "fcute",
        "fcute_sm80": "peer_mma_sync",
        "cudnn": "peer_cudnn",
        "flash2": "peer_fa2",
    }


# ---- the model -------------------------------------------------------------------------------------


def make_layers(options: argparse.Namespace) -> Any:
    torch.manual_seed(options.seed)
    width, inner, layers = (128, 256, 2) if options.tiny else (2048, 8192, 16)
    heads = width // options.head_dim
    config = transformers.LlamaConfig(
        vocab_size=4,  # not used
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=options.seqlen,
        use_cache=False,
        attn_implementation="eager",
    )
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return transformers.LlamaModel(config).to(options.device, dtype)


class Step:
    """The forward, and the backward from a random gradient: one of the norm of the output would be 0, by the last
    layer's normalisation."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        shape = (1, options.seqlen, model.config.hidden_size)
        self.model = model
        self.inputs, self.dout = (
            torch.randn(shape, device=options.device, dtype=model.dtype) for _ in range(2)
        )
        self.inputs.requires_grad_()

    def __call__(self) -> Tensor:
        """Returns the gradient of the inputs."""
        self.model.zero_grad(set_to_none=True)
        self.inputs.grad = None
        self.model(inputs_embeds=self.inputs).last_hidden_state.backward(self.dout)
        assert self.inputs.grad is not None
        return self.inputs.grad

    def take(self, attention: str) -> None:
        self.model.set_attn_implementation(attention)


# ---- measurements ----------------------------------------------------------------------------------


def timed(step: Step) -> float:
    """Milliseconds of a step."""
    if not step.inputs.is_cuda:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def kernel_times(step: Step) -> dict[str, float | None]:
    """Milliseconds of attention's kernels in a step, and of all."""
    if not step.inputs.is_cuda:
        return {"ms_attention": None, "ms_kernels": None}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    times = {x.key: x.self_device_time_total / 1e3 for x in profile.key_averages()}
    own = sum(ms for name, ms in times.items() if OF_ATTENTION.search(name))
    return {"ms_attention": own, "ms_kernels": sum(times.values())}


def measure(step: Step, attentions: dict[str, str], rounds: int) -> dict[str, Line]:
    times: dict[str, list[float]] = {name: [] for name in attentions}
    for n in range(-WARM_UP, rounds):
        for name, registered in attentions.items():
            step.take(registered)
            ms = timed(step)
            if n >= 0:
                times[name].append(ms)
    found: dict[str, Line] = {}
    for name, registered in attentions.items():
        step.take(registered)
        found[name] = {
            "ms_p50": statistics.median(times[name]),
            "samples": rounds,
            **kernel_times(step),
        }
    return found


def apart(step: Step, attentions: dict[str, str]) -> dict[str, float]:
    """How far the gradient of the inputs is from that of the first attention."""
    grads = []
    for registered in attentions.values():
        step.take(registered)
        grads.append(step().double())
    norm = grads[0].norm()
    return {
        name: float((x - grads[0]).norm() / norm) for name, x in zip(attentions, grads, strict=True)
    }


def show(found: dict[str, Line]) -> None:
    print(f"{'attention':<12}{'ms a step':>10}{'of it attention':>17}{'share':>8}{'apart':>10}")
    for name, line in found.items():
        own, all_kernels = line["ms_attention"], line["ms_kernels"]
        told = ("-", "-") if own is None else (f"{own:.2f}", f"{100 * own / all_kernels:.1f} %")
        print(f"{name:<12}{line['ms_p50']:>10.2f}{told[0]:>17}{told[1]:>8}{line['apart']:>10.1e}")
    print("apart: gradients of the inputs, from those of the first, relative")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--head-dim", type=int, default=64, choices=(64, 128))
    parser.add_argument("--seqlen", type=int, help="default: 8192, with --tiny 48")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--impls", default="fcute,fcute_sm80,cudnn,flash2", metavar="NAME,...")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two layers that any machine can run")
    parser.add_argument("--out", metavar="FILE", help="append the JSON lines to this file")
    parser.add_argument("--commit", metavar="TEXT", help="default: that of the checkout")
    options = parser.parse_args()
    options.seqlen = options.seqlen or (48 if options.tiny else 8192)

    known = add_attentions()
    names = options.impls.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"--impls: expected names among {', '.join(known)}, got {sorted(unknown)}")
    attentions = {name: known[name] for name in names}
    model = make_layers(options)
    config = model.config
    step = Step(model, options)
    parameters = sum(x.numel() for x in model.parameters())
    print(f"{parameters / 1e6:.1f} million parameters, {options.seqlen} tokens")
    distances = apart(step, attentions)
    found = measure(step, attentions, options.rounds)
    kit = (TorchCudaKit if options.device == "cuda" else TorchCpuKit)(options.seed)
    for name, line in found.items():
        line["apart"] = distances[name]
        if not options.out:
            continue
        whole = {
            "kind": "llama_step",
            **provenance(kit, options.commit),
            "transformers": transformers.__version__,
            "parameters": parameters,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": options.head_dim,
            "seqlen": options.seqlen,
            "dtype": str(model.dtype).removeprefix("torch."),
            "impl": name,
            **line,
        }
        with open(options.out, "a") as out:
            out.write(json.dumps(whole, allow_nan=False) + "\n")
    show(found)
    return 0 if all(x < NOISE for x in distances.values()) else 1  # NaN is not


if __name__ == "__main__":
    sys.exit(main())
