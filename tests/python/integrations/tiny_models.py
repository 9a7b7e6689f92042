"""Models of transformers with random weights, two layers and a width of 64, and inputs for them.

Nothing is downloaded.
"""

from __future__ import annotations

import copy
import os
from functools import cache
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a download would fail, and with it the test

import torch
import transformers

WORDS, BATCH, LENGTH, WINDOW = 97, 2, 12, 8

# Weights ten times as large as usual: with the usual ones all scores are nearly equal, and a wrong mask hardly shows.
TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
DECODER = TEXT | {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}

# name: (class, configuration class, settings)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": WINDOW}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        DECODER | {"head_dim": 16, "sliding_window": WINDOW},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        DECODER
        | {
            "head_dim": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,  # all: a choice that rounding changes would be another function
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "experts_implementation": "eager",  # the others know no float64
        },
    ),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}
        | {"image_size": 12, "patch_size": 4, "num_labels": 5},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": WORDS,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 64,
            "init_std": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "decoder_start_token_id": 1,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": WORDS,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": None,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
            "initializer_factor": 1.0,
        },
    ),
}


@cache
def model(name: str) -> Any:
    """One for all tests, in float32 on the CPU. Which attention it takes is set before each use."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()


@cache
def exact(name: str) -> Any:
    """The same weights in float64, with eager attention that is float64 throughout."""
    twin = copy.deepcopy(model(name)).double()
    twin.set_attn_implementation("exact")
    return twin


def exact_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float,
    position_bias: Any = None,
    s_aux: Any = None,
    **_: Any,
) -> Any:
    """transformers' eager attention would compute its softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    for bias in (attention_mask, position_bias):
        scores = scores if bias is None else scores + bias
    keys = scores.shape[-1]
    if s_aux is not None:
        sinks = s_aux[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    return (scores.softmax(-1)[..., :keys] @ value).transpose(1, 2).contiguous(), None


def exact_mask(*args: Any, **kwargs: Any) -> Any:
    """That of eager attention, with numbers that float64 can add to."""
    kwargs["dtype"] = torch.float32
    return transformers.masking_utils.eager_mask(*args, **kwargs)


transformers.AttentionInterface.register("exact", exact_attention)
transformers.AttentionMaskInterface.register("exact", exact_mask)


class Inputs(NamedTuple):
    """arguments: of the model. real: (batch, seqlen), where the output counts; None: everywhere."""

    arguments: dict[str, Any]
    real: Any = None


def tokens(rows: int = BATCH, length: int = LENGTH) -> Any:
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Any:
    """(batch, seqlen) of 0 and 1: the second sequence is shorter."""
    real = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side == "left":
        real[1, :4] = 0
    elif side == "right":
        real[1, -4:] = 0
    return real


def noise(*shape: int) -> Any:
    """Normal numbers that every dtype holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).bfloat16().float()


def inputs(name: str, arrangement: str) -> Inputs:
    """arrangement: "whole", "left" or "right" padding, or "packed" by position_ids."""
    if name == "vit":
        return Inputs({"pixel_values": noise(BATCH, 3, 12, 12)})
    if arrangement == "packed":  # three sequences in one row
        positions = torch.tensor([[*range(5), *range(4), *range(3)]])
        return Inputs({"input_ids": tokens(1), "position_ids": positions, "use_cache": False})
    real = padding(arrangement)
    arguments = {"input_ids": tokens()}
    if arrangement != "whole":
        arguments["attention_mask"] = real
    if name == "whisper":
        arguments = {
            "input_features": noise(BATCH, 8, 20),
            **{f"decoder_{k}": v for k, v in arguments.items()},
        }
    if name == "t5":
        arguments["decoder_input_ids"] = tokens()
    return Inputs(arguments, real if name != "t5" else None)


def cast(arguments: dict[str, Any], device: str, dtype: Any) -> dict[str, Any]:
    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: moved(x) for name, x in arguments.items()}
