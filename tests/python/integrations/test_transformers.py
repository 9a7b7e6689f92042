"""Models of transformers with ``attn_implementation="fcute"`` beside the same with ``"eager"``."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import flashcute as fc
import optional_torch
import pytest
from optional_torch import torch

if not optional_torch.available:
    pytest.skip(optional_torch.REASON, allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

import tiny_models
import transformers
from flashcute.integrations import transformers as integration
from tiny_models import BATCH, LENGTH, Inputs, cast, inputs, model, noise, tokens

integration.register(on_unsupported="silent")

ARRANGEMENTS = ("whole", "left", "right", "packed")
SERVED = [
    *((name, how) for name in ("llama", "mistral", "qwen3") for how in ARRANGEMENTS),
    *((name, how) for name in ("bert", "whisper") for how in ARRANGEMENTS[:3]),
    # Of position_ids it makes no mask: all is one sequence, as under eager.
    *(("gpt_oss", how) for how in ARRANGEMENTS),
    ("t5", "whole"),
    ("t5", "left"),
    ("vit", "whole"),
]


@pytest.fixture(autouse=True)
def _heard_again() -> None:
    """Each test hears the warnings that another has had."""
    integration._warned.clear()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For such small tensors torch's threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_attention(name: str, implementation: str) -> Any:
    found = model(name)
    found.set_attn_implementation(implementation)
    return found


# ---- logits and gradients ------------------------------------------------------------------------


def logits_and_gradients(subject: Any, given: Inputs) -> dict[str, Any]:
    """The logits where they count, and the gradients of a random weighting of them."""
    subject.zero_grad(set_to_none=True)
    logits = subject(**given.arguments).logits
    if given.real is not None:
        logits = logits[given.real.to(logits.device).bool()]
    (logits * noise(*logits.shape).to(logits)).sum().backward()
    gradients = {n: p.grad for n, p in subject.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    return {"logits": logits.detach(), **{n: g.clone() for n, g in gradients.items()}}


def error(found: Any, exact: Any) -> float:
    return float((found.double().cpu() - exact).abs().max())


def require_exact(
    mine: dict[str, Any], eager: dict[str, Any], exact: dict[str, Any], dtype: Any
) -> None:
    """Of each result at most twice the error of eager attention in the same dtype, plus what rounding its largest
    number a few times makes."""
    assert mine.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        # A key's bias adds the same to all scores of a query, so its gradient is 0 but for the rounding of its terms.
        # They are as large as the gradient of the weight.
        weight = exact.get(name.replace(".bias", ".weight"), truth)
        largest = max(float(x.abs().max()) for x in (truth, weight))
        allowed = 2 * error(eager[name], truth) + 16 * torch.finfo(dtype).eps * largest
        assert error(mine[name], truth) <= allowed, name


def by_three(name: str, compute: Any) -> tuple[Any, Any, Any]:
    """What compute(model, dtype) gives under fcute, under eager, and in float64."""
    return (
        compute(with_attention(name, "fcute"), torch.float32),
        compute(with_attention(name, "eager"), torch.float32),
        compute(tiny_models.exact(name), torch.float64),
    )


@pytest.mark.parametrize(("name", "how"), SERVED)
def test_logits_and_gradients_are_as_exact_as_eager(name: str, how: str) -> None:
    """A mask that is dropped, doubled or shifted; heads that are mixed up; a scale that is forgotten."""

    def compute(subject: Any, dtype: Any) -> dict[str, Any]:
        given = inputs(name, how)
        return logits_and_gradients(
            subject, given._replace(arguments=cast(given.arguments, "cpu", dtype))
        )

    require_exact(*by_three(name, compute), torch.float32)


MISTAKES: dict[str, dict[str, Any]] = {
    "no mask": {"attention_mask": None},
    "not causal": {"attention_mask": None, "is_causal": False},
    "another scale": {"scaling": 0.251},
    "no sink": {"s_aux": None},
    "no window": {"sliding_window": None},
}


@pytest.mark.parametrize(
    ("name", "mistake", "how"),
    [
        ("llama", "no mask", "left"),
        ("llama", "no mask", "packed"),
        ("llama", "not causal", "whole"),
        ("llama", "another scale", "whole"),
        ("gpt_oss", "no sink", "whole"),
        ("gpt_oss", "no sink", "left"),
        ("gpt_oss", "no window", "whole"),
    ],
)
def test_mistakes_are_noticed(name: str, mistake: str, how: str) -> None:
    """A comparison that would let a wrong mask, scale or sink pass."""
    right = integration.attention_function("silent", frozenset())

    def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return right(
            module, query, key, value, **{"attention_mask": mask, **kwargs, **MISTAKES[mistake]}
        )

    transformers.AttentionInterface.register("wrong", wrong)
    masks = integration.mask_function(transformers.masking_utils)
    transformers.AttentionMaskInterface.register("wrong", masks)

    def compute(subject: Any, dtype: Any) -> dict[str, Any]:
        return logits_and_gradients(subject, inputs(name, how))

    _, eager, exact = by_three(name, compute)
    subject = with_attention(name, "wrong")
    mine = compute(subject, torch.float32)
    if mistake == "no sink":  # the parameter has no gradient then, which is noticed by its name
        mine |= {n: torch.zeros_like(p) for n, p in subject.named_parameters() if "sinks" in n}
    with pytest.raises(AssertionError):
        require_exact(mine, eager, exact, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "whisper"])
def test_checkpointing_changes_no_bit(name: str) -> None:
    """A forward that is computed again in the backward, with other bits or with another mask."""
    given = inputs(name, "left")
    subject = with_attention(name, "fcute")
    plain = logits_and_gradients(subject, given)
    calls = []
    layers = [x for n, x in subject.named_modules() if n.endswith("self_attn")]
    hooks = [x.register_forward_hook(lambda *_: calls.append(1)) for x in layers]
    subject.gradient_checkpointing_enable({"use_reentrant": False})
    subject.train()  # only then are layers computed again; none of the models has dropout
    try:
        again = logits_and_gradients(subject, given)
    finally:
        subject.eval()
        subject.gradient_checkpointing_disable()
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2 * len(layers)
    assert all(torch.equal(again[n], x) for n, x in plain.items())


# ---- generation ------------------------------------------------------------------------------------

GENERATION: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "static beam search": {"num_beams": 3, "cache_implementation": "static"},
    "prefill in parts": {"prefill_chunk_size": 5},  # more keys than queries, and not from the start
    "assisted": {"prompt_lookup_num_tokens": 3},  # several queries after what is cached
}
PROMPTS = {"whole": LENGTH, "left": LENGTH, "one token": 1}


def generated(subject: Any, arguments: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    found = subject.generate(
        **arguments,
        **options,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    return {"sequences": found.sequences, "logits": torch.stack(found.logits)}


@pytest.mark.parametrize(
    ("name", "prompt", "way"),
    [
        *(("llama", prompt, way) for prompt in ("whole", "left") for way in GENERATION if way != "assisted"),
        *(("mistral", prompt, way) for prompt in ("whole", "left") for way in GENERATION if way != "assisted"),
        *(("gpt_oss", prompt, way) for prompt in ("whole", "one token") for way in ("dynamic cache", "beam search")),
        *(("gpt_oss", "left", way) for way in ("dynamic cache", "static cache", "prefill in parts")),
        *((name, "one token", way) for name in ("llama", "mistral") for way in ("dynamic cache", "static cache")),
        *((name, "whole", "assisted") for name in ("llama", "mistral")),
        ("qwen3", "left", "static cache"),
        *(("whisper", "whole", way) for way in ("dynamic cache", "static cache", "beam search")),
    ],
)  # fmt: skip
def test_generated_tokens_are_those_of_eager(name: str, prompt: str, way: str) -> None:
    """Cached keys that are not written yet and are attended to; a causal mask that is aligned to the wrong end."""

    def compute(subject: Any, dtype: Any) -> dict[str, Any]:
        if name == "whisper":
            arguments = {"input_features": noise(BATCH, 8, 20)}
        else:
            arguments = {"input_ids": tokens(1 if way == "assisted" else BATCH, PROMPTS[prompt])}
            if prompt == "left":
                arguments["attention_mask"] = tiny_models.padding("left")
        return generated(subject, cast(arguments, "cpu", dtype), GENERATION[way])

    mine, eager, exact = by_three(name, compute)
    for found in (mine, exact):
        assert torch.equal(found.pop("sequences"), eager["sequences"])
    del eager["sequences"]
    require_exact(mine, eager, exact, torch.float32)


# ---- torch.compile ---------------------------------------------------------------------------------


def compiled(subject: Any) -> tuple[Any, set[str]]:
    """Its forward as one graph, and the operators in it. By aot_eager: Dynamo and the operators' fakes are what is at
    stake, and Inductor would take minutes."""
    operators: set[str] = set()

    def backend(graph: Any, examples: Any) -> Any:
        operators.update(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    return torch.compile(subject.forward, backend=backend, fullgraph=True), operators


OPERATOR = "flashcute.flash_attention_forward.default"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoding_compiles_as_one_graph(name: str, cache: str) -> None:
    """Code that torch.compile cannot trace, or a cache that a compiled step reads wrongly."""

    @torch.no_grad()
    def decode(subject: Any, forward: Any) -> dict[str, Any]:
        past = (
            transformers.StaticCache(config=subject.config, max_cache_len=LENGTH + 4)
            if cache == "static"
            else transformers.DynamicCache(config=subject.config)
        )
        words = tokens()
        logits = [subject(words[:, :8], cache=past).logits[:, -1:]]
        for at in range(8, LENGTH):
            step, positions = words[:, at : at + 1], torch.tensor([[at]])
            found = forward(input_ids=step, position_ids=positions, cache=past)
            logits.append(found.logits)
        return {"logits": torch.cat(logits, 1)}

    subject = with_attention(name, "fcute")
    forward, operators = compiled(subject)
    mine = decode(subject, forward)
    _, eager, exact = by_three(name, lambda model, dtype: decode(model, model.forward))
    require_exact(mine, eager, exact, torch.float32)
    assert OPERATOR in operators


@pytest.mark.parametrize(("name", "use_cache"), [("llama", True), ("llama", False), ("bert", None)])
def test_training_compiles_as_one_graph(name: str, use_cache: bool | None) -> None:
    """Kernels that compiled training does not reach. Without a cache transformers makes a mask: it looks whether
    position_ids are packed, which it cannot while it is traced. Kernels have the mask."""
    given = inputs(name, "whole")
    if use_cache is not None:
        given.arguments["use_cache"] = use_cache

    class Compiled(torch.nn.Module):
        def __init__(self, subject: Any) -> None:
            super().__init__()
            self.subject = subject
            self.run, self.operators = compiled(subject)

        def named_parameters(self, *_: Any, **__: Any) -> Any:
            return self.subject.named_parameters()

        def forward(self, **arguments: Any) -> Any:
            return self.run(**arguments)

    _, eager, exact = by_three(name, lambda subject, dtype: logits_and_gradients(subject, given))
    subject = Compiled(with_attention(name, "fcute"))
    require_exact(logits_and_gradients(subject, given), eager, exact, torch.float32)
    assert OPERATOR in subject.operators
    assert ("flashcute.block_mask.default" in subject.operators) == (use_cache is False)


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "argument", "how"), [("gemma2", "softcap", how) for how in ARRANGEMENTS]
)
def test_what_no_kernel_computes_is_refused(name: str, argument: str, how: str) -> None:
    """Scores that are not capped: plausible text, and the wrong model."""
    subject = with_attention(name, "fcute")
    with pytest.raises(fc.UnsupportedError, match=f"^{argument}: .*eager"):
        subject(**inputs(name, how).arguments)
    with pytest.raises(fc.UnsupportedError, match=f"^{argument}: "):
        subject.generate(tokens(), max_new_tokens=2, cache_implementation="static")


def test_attention_weights_are_refused() -> None:
    """A tuple of None where the caller asked for weights."""
    with pytest.raises(fc.UnsupportedError, match=r"^output_attentions: .*eager"):
        with_attention("llama", "fcute")(tokens(), output_attentions=True)


# ---- packed sequences by their lengths -------------------------------------------------------------


def lengths_of(*sizes: int) -> dict[str, Any]:
    """What a data collator that flattens a batch hands to the model."""
    ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    longest = max(sizes)
    return {
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest
    }  # fmt: skip


@pytest.fixture
def _kernels_alone() -> Iterator[None]:
    """An UnsupportedError where torch's attention would compute."""
    integration.register(on_unsupported="error")
    yield
    integration.register(on_unsupported="silent")


@pytest.mark.usefixtures("_kernels_alone")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("positions", ["run on", "begin again"])
def test_packed_lengths_are_a_loop(name: str, positions: str) -> None:
    """Sequences that see each other, a window that reaches into the one before, a sink that counts for all of them
    once; gradients of these. The rotation of keys and queries is relative, so positions may run on."""
    sizes, subject = (3, 1, 9, 11), with_attention(name, "fcute")
    words, together = tokens(1, sum(sizes)), lengths_of(*sizes)
    if (
        positions == "begin again"
    ):  # beside an empty cache, as by default, transformers makes no mask of them
        together["position_ids"] = torch.cat([torch.arange(n) for n in sizes])[None]
        together["use_cache"] = True

    def compute(run: Any) -> dict[str, Any]:
        subject.zero_grad(set_to_none=True)
        logits = run()
        (logits * noise(*logits.shape)).sum().backward()
        found = {n: p.grad.clone() for n, p in subject.named_parameters() if p.grad is not None}
        return {"logits": logits.detach(), **found}

    mine = compute(lambda: subject(words, **together).logits)
    loop = compute(lambda: torch.cat([subject(x).logits for x in words.split(sizes, 1)], 1))
    assert mine.keys() == loop.keys()
    for n, expected in loop.items():
        limit = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(mine[n], expected, atol=limit, rtol=1e-4, msg=n)
    if name == "mistral":
        assert max(sizes) > subject.config.sliding_window


def test_packed_lengths_beside_a_mask() -> None:
    """Two sayings of where sequences end, of which one is dropped, or a mask that is ignored: without a cache
    transformers makes one of position_ids that begin again."""
    together = lengths_of(5, 4, 3)
    subject, given = with_attention("llama", "fcute"), inputs("llama", "packed").arguments
    expected = subject(**given).logits
    assert torch.equal(subject(**given, **together).logits, expected)
    packed = subject(**given | {"use_cache": True}, **together).logits  # without a mask
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_kernels_alone")
def test_a_collator_that_flattens() -> None:
    """What transformers' own collator returns, refused or misread."""
    sentences = [{"input_ids": tokens(1, n)[0].tolist()} for n in (5, 3, 9)]
    make = transformers.DataCollatorWithFlattening
    subject = with_attention("llama", "fcute")
    whole = make(return_flash_attn_kwargs=True)(sentences)
    without = make(return_flash_attn_kwargs=True, return_position_ids=False)(sentences)
    losses = [subject(**whole, use_cache=True).loss, subject(**without, use_cache=False).loss]
    # Each token but the first of a sentence is predicted.
    alone = [(len(s["input_ids"]) - 1, torch.tensor([s["input_ids"]])) for s in sentences]
    expected = sum(n * subject(x, labels=x).loss for n, x in alone) / sum(n for n, _ in alone)
    for loss in losses:
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


# ---- the attention function by itself --------------------------------------------------------------


class Layer:
    is_causal = True


def require_close(found: Any, exact: Any) -> None:
    """Of float32: the limit that all tests have for it."""
    torch.testing.assert_close(found.double().cpu(), exact, atol=1e-5, rtol=1e-5)


def call(queries: int = 3, keys: int = 3, mask: Any = None, accept: str = "", **kwargs: Any) -> Any:
    """q, k, v and what the attention function makes of them."""
    q, k, v = noise(BATCH, 4, queries, 16), noise(BATCH, 2, keys, 16), noise(BATCH, 2, keys, 16)
    attend = integration.attention_function("silent", frozenset([accept]))
    return q, k, v, attend(Layer(), q, k, v, mask, **kwargs)[0]


def by_torch(q: Any, k: Any, v: Any, mask: Any = None, **kwargs: Any) -> Any:
    """(batch, seqlen, heads, head_dim), in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, mask, enable_gqa=True, **kwargs).transpose(1, 2)


def test_an_empty_static_cache_is_not_seen(device: str) -> None:
    """Keys behind the queries' own, which are not written yet: here they are NaN."""
    q, k, v = noise(1, 2, 5, 16), noise(1, 2, 9, 16), noise(1, 2, 9, 16)
    k[:, :, 5:] = v[:, :, 5:] = torch.nan
    attend = integration.attention_function("error", frozenset())
    out, weights = attend(Layer(), *(x.to(device) for x in (q, k, v)), None)
    assert weights is None
    require_close(out, by_torch(q, k[:, :, :5], v[:, :, :5], is_causal=True))


@pytest.mark.parametrize(
    ("arguments", "causal"),
    [({}, True), ({"is_causal": False}, False), ({"is_causal": None}, True), ({"queries": 1}, False)],
)  # fmt: skip
def test_what_is_causal(arguments: dict[str, Any], causal: bool) -> None:
    """A decoder that sees the future; an encoder, or the last query of a cache, that does not see everything."""
    q, k, v, out = call(keys=3, **{"queries": 3, **arguments})
    require_close(out, by_torch(q, k, v, is_causal=causal))
    assert out.shape == (BATCH, q.shape[2], 4, 16)
    assert out.is_contiguous()


def test_a_mask_says_everything() -> None:
    """A mask that the causal one narrows a second time: of prefixes, or of several queries after what is cached."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()[None, None]
    q, k, v, out = call(2, 4, mask)
    require_close(out, by_torch(q, k, v, mask))
    assert out.is_contiguous()


def test_packed_lengths_narrow_a_mask() -> None:
    """A mask that was made without knowing of the sequences in a row."""
    ends = torch.tensor([0, 2, 3], dtype=torch.int32)
    causal = torch.ones(3, 3).tril().bool()[None, None]
    packed = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
    for mask in (causal, torch.zeros(1, 1, 3, 3).masked_fill(~causal, -torch.inf)):
        q, k, v, out = call(3, 3, mask, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
        require_close(out, by_torch(q, k, v, packed))


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": False}, {"sliding_window": 2}, {"sliding_window": 1, "scaling": 0.3}],
)
def test_packed_lengths_without_a_mask(
    device: str, options: dict[str, Any], with_sinks: bool
) -> None:
    """Sequences of a flattened batch that see each other: here they end in the middle of its rows, one of them is
    empty, and two have one token. Offsets may be of 64 bits. A sink that is counted for each sequence, or not
    learned."""
    sizes = (2, 3, 1, 0, 1, 7)
    q, k, v = leaves = [
        x.to(device).requires_grad_() for x in (noise(2, 4, 7, 16), *[noise(2, 2, 7, 16)] * 2)
    ]
    attend = integration.attention_function("error", frozenset())
    if with_sinks:
        options = {
            **options,
            "s_aux": torch.tensor([-2.0, 0.0, 1.5, 8.0], device=device).requires_grad_(),
        }
        leaves.append(options["s_aux"])
    together = {
        name: x.to(device, torch.int64) if isinstance(x, torch.Tensor) else x
        for name, x in lengths_of(*sizes).items()
    }
    out, weights = attend(Layer(), q, k, v, None, **together, **options)
    assert weights is None
    assert out.shape == (2, 7, 4, 16)
    assert out.is_contiguous()
    rows = [x.transpose(1, 2).flatten(0, 1).split(sizes) for x in (q, k, v)]
    parts = [
        attend(Layer(), *(x[None].transpose(1, 2) for x in part), None, **options)[0][0]
        for part in zip(*rows, strict=True)
    ]
    expected = torch.cat(parts).unflatten(0, (2, 7))
    require_close(out, expected.double().cpu())
    weights = torch.randn_like(out)
    want = torch.autograd.grad(expected, leaves, weights)
    for mine, theirs in zip(torch.autograd.grad(out, leaves, weights), want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_packed_queries_after_cached_keys() -> None:
    """Other numbers of keys than of queries: the last query of each sequence sees its last key, also where there is
    one query in all."""
    attend = integration.attention_function("error", frozenset())
    for rows, keys in (((2, 1), (5, 3)), ((1,), (4,))):
        q, k, v = noise(1, 4, sum(rows), 16), noise(1, 2, sum(keys), 16), noise(1, 2, sum(keys), 16)
        together = {
            "cu_seq_lens_q": lengths_of(*rows)["cu_seq_lens_q"],
            "cu_seq_lens_k": lengths_of(*keys)["cu_seq_lens_k"],
        }
        out, _ = attend(Layer(), q, k, v, None, **together, sliding_window=3)
        parts = zip(q.split(rows, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
        expected = torch.cat([
            by_torch(*part, torch.ones(n, m).bool().tril(m - n).triu(m - n - 2))
            for part, n, m in zip(parts, rows, keys, strict=True)
        ], 1)  # fmt: skip
        require_close(out, expected)


@pytest.mark.parametrize("setting", ["warn", "silent", "error"])
def test_packed_sequences_are_not_left_to_torch(setting: str) -> None:
    """Sequences that see each other, because torch's attention, which has dropout and biases, knows only one; a warning
    that it computes."""
    q, attend = noise(1, 4, 5, 16), integration.attention_function(setting, frozenset())
    for name, value in (("dropout", 0.1), ("position_bias", noise(1, 4, 5, 5))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(
                fc.UnsupportedError, match=rf"^{name}: expected none beside cu_seq_lens_q"
            ):
                attend(Layer(), q, q, q, None, **lengths_of(2, 3), **{name: value})


# Beside q of float32 kernels take float32 alone.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_sinks_of_any_dtype(device: str, dtype: str) -> None:
    """A sink that is scaled, masked or not learned; one of another head."""
    q, k, v = noise(1, 4, 5, 16), noise(1, 2, 5, 16), noise(1, 2, 5, 16)
    sinks = torch.tensor([-2.0, 0.0, 1.5, 8.0], dtype=getattr(torch, dtype), device=device)
    sinks.requires_grad_()
    attend = integration.attention_function("error", frozenset())
    out, _ = attend(
        Layer(), *(x.to(device) for x in (q, k, v)), None, s_aux=sinks, sliding_window=3, scaling=0.3
    )  # fmt: skip
    truth = sinks.detach().double().cpu().requires_grad_()
    q, k, v = (x.double() for x in (q, k, v))
    seen = torch.ones(5, 5).tril().triu(-2).bool()
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen, -torch.inf)
    scores = torch.cat((scores, truth[None, :, None, None].expand(1, 4, 5, 1)), -1)
    expected = (scores.softmax(-1)[..., :5] @ v.repeat_interleave(2, 1)).transpose(1, 2)
    require_close(out, expected)
    for x in (out, expected):
        x.pow(2).sum().backward()
    assert sinks.grad.dtype == sinks.dtype
    limit = 1e-5 if dtype in ("float32", "float64") else 4 * torch.finfo(sinks.dtype).eps
    torch.testing.assert_close(sinks.grad.double().cpu(), truth.grad, atol=limit, rtol=limit)


@pytest.mark.parametrize("setting", ["warn", "silent", "error"])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mask": torch.zeros(1, 1, 3, 3)}, "attention masks of floats"),
        ({"position_bias": torch.zeros(1, 4, 3, 3)}, "position biases"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_sinks_that_torch_would_drop(setting: str, arguments: dict[str, Any], reason: str) -> None:
    """A call that torch's attention computes without the sinks."""
    q, (mask, others) = noise(1, 4, 3, 16), (arguments.get("mask"), dict(arguments))
    others.pop("mask", None)
    attend = integration.attention_function(setting, frozenset())
    with pytest.raises(fc.UnsupportedError, match=f"^s_aux: .* beside {reason}, .*'eager'"):
        attend(Layer(), q, q, q, mask, s_aux=torch.zeros(4), **others)


@pytest.mark.parametrize("sinks", [torch.zeros(2), torch.zeros(4, 1), 0.5])
def test_sinks_of_another_shape(sinks: Any) -> None:
    """Sinks of the key heads, or of each query, that are broadcast."""
    with pytest.raises(fc.ArgumentError, match=r"^s_aux: expected .* \(4,\), got"):
        call(s_aux=sinks)


@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
def test_a_bias_is_added_and_learned(masked: Any) -> None:
    """A relative position bias that is dropped, or that gets no gradient."""
    seen = torch.ones(3, 3).tril().bool()[None, None]
    minus = torch.zeros(1, 1, 3, 3).masked_fill(~seen, -torch.inf)
    mask = {None: None, torch.bool: seen, torch.float32: minus}[masked]
    bias = noise(1, 4, 3, 3).requires_grad_()
    q, k, v, out = call(3, 3, mask, position_bias=bias)
    truth = noise(1, 4, 3, 3).double().requires_grad_()
    expected = by_torch(q, k, v, truth + minus.double())
    require_close(out, expected)
    for x in (out, expected):
        x.pow(2).sum().backward()
    torch.testing.assert_close(bias.grad.double(), truth.grad, atol=2e-5, rtol=2e-5)


def test_dropout_drops() -> None:
    """Dropout that is asked for in training, and ignored."""
    torch.manual_seed(3)
    q, k, v, out = call(3, 3, dropout=0.5, is_causal=False)
    torch.manual_seed(3)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(out, attend(q, k, v, dropout_p=0.5, enable_gqa=True).transpose(1, 2))


def test_a_window_that_no_mask_has() -> None:
    """A window that is dropped, or is off by one."""
    assert torch.equal(call(3, 3, sliding_window=3)[-1], call(3, 3)[-1])
    q, k, v, out = call(3, 3, sliding_window=2)
    seen = torch.ones(3, 3).tril().triu(-1).bool()
    require_close(out, by_torch(q, k, v, seen))
    with pytest.raises(fc.UnsupportedError, match=r"^sliding_window: .* 2 .* 2 queries and 3 keys"):
        call(2, 3, sliding_window=2)


def test_a_sliding_window_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of seqlen x seqlen for a window that kernels have; a window that is lost with its mask."""
    masks = []
    attend = integration.flash_attention

    def heard(*tensors: Any, attn_mask: Any, **options: Any) -> Any:
        masks.extend([] if attn_mask is None else [attn_mask])
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(integration, "flash_attention", heard)
    integration.register(on_unsupported="error")
    try:
        given = inputs("mistral", "whole").arguments
        eager, subject = (with_attention("mistral", name) for name in ("eager", "fcute"))
        assert given["input_ids"].shape[1] > subject.config.sliding_window
        found, expected = (one(**given).logits for one in (subject, eager))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        # And each token after a cache that holds no more than the window.
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        mine, theirs = (one.generate(given["input_ids"], **options) for one in (subject, eager))
        assert torch.equal(mine, theirs)
        assert not masks
        subject(**inputs("mistral", "left").arguments)  # a mask says more there
        assert masks
        del masks[:]
        subject.generate(given["input_ids"], **options, cache_implementation="static")
        assert masks
    finally:
        integration.register()


WINDOWED = {  # (class, configuration class, settings beside those of a decoder)
    "mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 2}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"use_sliding_window": True, "max_window_layers": 0}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 16}),
    # With sinks.
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"head_dim": 16, "num_local_experts": 4}),
    "flint": (
        "FlintForCausalLM", "FlintConfig",
        {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "granite_swa": ("GraniteSWAForCausalLM", "GraniteSWAConfig", {}),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", "GraniteMoeSWAConfig", {"num_local_experts": 2}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", "MiMoV2FlashConfig", {}),
    # These do not hand the window to their attention.
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {"use_sliding_window": True, "max_window_layers": 2, "num_experts": 2, "num_experts_per_tok": 1,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {"num_local_experts": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_of_other_models(name: str) -> None:
    """A window that the model leaves to a mask, where none is made: keys outside of it are attended to."""
    import tiny_models

    kind, configuration, settings = WINDOWED[name]
    settings = tiny_models.DECODER | {"sliding_window": 4} | settings
    config = getattr(transformers, configuration)(**settings)
    assert name in integration.HAND_DOWN_THE_WINDOW or name in ("qwen2_moe", "phimoe")
    assert config.model_type == name
    layers = getattr(config, "layer_types", None)  # where there is none, all have the window
    assert layers is None or "sliding_attention" in layers
    torch.manual_seed(0)
    subject = getattr(transformers, kind)(config).eval()
    ids = tokens(length=13)
    found = {}
    for implementation in ("eager", "fcute"):
        subject.set_attn_implementation(implementation)
        found[implementation] = subject(ids).logits
    torch.testing.assert_close(found["fcute"], found["eager"], atol=1e-3, rtol=1e-3)


def test_all_models_that_hand_down_the_window_are_tested() -> None:
    assert WINDOWED.keys() >= integration.HAND_DOWN_THE_WINDOW


def test_which_functions_are_causal_windows() -> None:
    """A mask that says more than a window, and is taken for one."""
    from transformers import masking_utils as masking

    window = masking.sliding_window_causal_mask_function(5)
    assert integration.causal_window(window, masking) == 5

    def other(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key > query - 5

    causal, overlay = masking.causal_mask_function, masking.sliding_window_overlay(5)
    for function in (
        causal, overlay, other, functools.partial(window),
        masking.and_masks(window, other), masking.and_masks(overlay, causal, other),
        masking.and_masks(causal, overlay), masking.and_masks(overlay, other), masking.and_masks(),
        masking.or_masks(overlay, causal), masking.chunked_causal_mask_function(5, torch.zeros(1)),
    ):  # fmt: skip
        assert integration.causal_window(function, masking) is None


def test_what_is_not_known_is_refused() -> None:
    """An argument that changes the scores, and is ignored."""
    known = {
        "position_ids": torch.arange(3),
        "use_cache": True,
        "output_attentions": False,
        "sinks": None,
    }
    call(**known)
    with pytest.raises(fc.UnsupportedError, match=r"^curvature: .*accept=\['curvature'\]"):
        call(curvature=torch.zeros(()))
    call(curvature=torch.zeros(()), accept="curvature")
    with pytest.raises(fc.UnsupportedError, match=r"^indices: .*chosen"):
        call(indices=torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": (BATCH, 3)}, r"^attention_mask: expected 4 dimensions.*got \(2, 3\)"),
        ({"mask": (1, 1, 3, 3), "cu_seq_lens_q": (2,)}, "^cu_seq_lens_q, cu_seq_lens_k: expected both"),
        ({"cu_seq_lens_k": (2,)}, "^cu_seq_lens_q, cu_seq_lens_k: expected both"),
    ],
)  # fmt: skip
def test_arguments_that_contradict_each_other(arguments: dict[str, Any], message: str) -> None:
    """A mask of padding, (batch, keys), that is taken for one of queries and keys."""
    made = {name: torch.ones(shape).bool() for name, shape in arguments.items()}
    with pytest.raises(fc.ArgumentError, match=message):
        call(**made)


# ---- warnings --------------------------------------------------------------------------------------


def added_mask() -> torch.Tensor:
    """A causal mask that is added to the scores."""
    return torch.full((BATCH, 1, LENGTH, LENGTH), -torch.inf).triu(1)


def test_each_reason_warns_once() -> None:
    """Two warnings for each layer of each step, or none at all; one where kernels compute."""
    integration.register("fcute_warns")
    subject = with_attention("llama", "fcute_warns")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for how in ("whole", "left"):
            subject(**inputs("llama", how).arguments)
        assert not [x for x in heard if "flashcute" in str(x.message)]
        for _ in range(2):
            subject(tokens(), attention_mask=added_mask())
        ours = [str(x.message) for x in heard if "flashcute" in str(x.message)]
        assert len(ours) == 1
        assert ours[0].startswith("attention masks of floats: no kernel of flashcute")


def test_masks_are_refused_on_request() -> None:
    """Torch's attention in place of the kernels, where the caller wants these or nothing."""
    integration.register("fcute_strict", on_unsupported="error")
    subject = with_attention("llama", "fcute_strict")
    for how in ("whole", "left"):
        subject(**inputs("llama", how).arguments)
    with pytest.raises(fc.UnsupportedError, match="attn_mask"):
        subject(tokens(), attention_mask=added_mask())


# ---- a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "how"),
    [("llama", "whole"), ("llama", "left"), ("llama", "packed"), ("mistral", "whole"), ("bert", "right"),
     ("whisper", "whole"), ("gpt_oss", "whole")],
)  # fmt: skip
def test_bfloat16_on_a_gpu_is_as_exact_as_eager(name: str, how: str) -> None:
    """As on the CPU: the truth is that of the weights as bfloat16 holds them."""
    narrow = copy.deepcopy(model(name)).to("cuda", torch.bfloat16)
    wide = copy.deepcopy(narrow).to("cpu", torch.float64)
    given = inputs(name, how)
    found = []
    for subject, implementation in ((narrow, "fcute"), (narrow, "eager"), (wide, "exact")):
        subject.set_attn_implementation(implementation)
        arguments = cast(given.arguments, subject.device, subject.dtype)
        found.append(logits_and_gradients(subject, given._replace(arguments=arguments)))
    mine, eager, exact = found
    require_exact(mine, eager, exact, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["dynamic cache", "static cache"])
def test_generation_on_a_gpu(way: str) -> None:
    """As on the CPU, in float32, whose tokens rounding does not change."""
    subject = copy.deepcopy(model("llama")).to("cuda")
    found = []
    for implementation in ("fcute", "eager"):
        subject.set_attn_implementation(implementation)
        found.append(generated(subject, {"input_ids": tokens().to("cuda")}, GENERATION[way]))
    assert torch.equal(found[0]["sequences"], found[1]["sequences"])
