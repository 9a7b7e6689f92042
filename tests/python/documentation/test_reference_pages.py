"""The pages of docs/reference against what they describe."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from flashcute.__main__ import command_parser
from optional_torch import needs_torch
from tables import errors, reference

ROOT = Path(__file__).parents[3]
PAGES = ROOT / "docs" / "reference"


# ---- the API -------------------------------------------------------------------------------------


def documented() -> set[str]:
    return set(re.findall(r"\.\. auto\w+:: (\S+?)(?:\(\))?$", text_of("api.md"), re.MULTILINE))


def text_of(page: str) -> str:
    return (PAGES / page).read_text()


def test_every_public_name_is_in_the_reference() -> None:
    """A function that was added and that nobody finds; a page for one that is gone fails to build."""
    assert {f"flashcute.{name}" for name in fc.__all__} <= documented()


@needs_torch
def test_every_module_for_users_is_in_the_reference() -> None:
    """A function of a road in that was added."""
    named = documented()
    for module in ("reference", "sdpa", "compat"):
        assert f"flashcute.{module}" in named
        found = importlib.import_module(f"flashcute.{module}")
        callables = {name for name in found.__all__ if callable(getattr(found, name))}
        assert {f"flashcute.{module}.{name}" for name in callables} <= named
    assert "flashcute.integrations.transformers.register" in named


@pytest.fixture
def plain_docstrings(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    return importlib.import_module("plain_docstrings")


def typeset(extension: Any, docstring: str) -> str:
    lines = docstring.splitlines()
    extension.typeset(None, "function", "", None, None, lines)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("q: (batch, d).  k: (batch, d_k).", "``q``\n    (batch, d).\n``k``\n    (batch, d_k)."),
        ("block_m, block_n: sizes\n    of a tile", "``block_m``, ``block_n``\n    sizes\n    of a tile"),
        ("Text.\nq and k: arrays\n\nMore.", "Text.\n\n``q``, ``k``\n    arrays\n\nMore."),
        ("See `forward`, and `a b`.", "See :py:obj:`forward`, and ``a b``."),
        ("A:\n\n    `a` = b\n    c\n\nEnd.", "A:\n\n.. code-block:: text\n\n    `a` = b\n    c\n\nEnd."),
        ("q's \"end\", causal=True, '' and x=(a, b).", "q's ``\"end\"``, ``causal=True``, ``''`` and ``x=(a, b)``."),
        ("x: one of\n    - a\n    - b\n    Else c.", "``x``\n    one of\n\n    - a\n    - b\n\n    Else c."),
        ("Raises ValueError: never.", "Raises ValueError: never."),
    ],
)  # fmt: skip
def test_docstrings_become_lists_and_blocks(
    plain_docstrings: Any, docstring: str, expected: str
) -> None:
    """Arguments that run into the text around them; formulas whose lines are joined."""
    assert typeset(plain_docstrings, docstring) == expected


def test_a_long_line_without_a_colon_is_read_at_once(plain_docstrings: Any) -> None:
    """A pattern that tries every way to cut a word: the pages would never be built."""
    typeset(plain_docstrings, "flash_attention_forward_of_packed_sequences_and_gradients, " * 20)


# ---- commands ------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    [found] = [x for x in command_parser()._actions if hasattr(x, "_choices_actions")]
    return dict(found.choices)


def test_every_command_has_a_section_with_an_example() -> None:
    """A command that was added or renamed: the options of those that are there come from the parsers themselves."""
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text_of("cli.md"), re.M | re.S))
    assert list(sections) == list(commands())
    for name, text in sections.items():
        assert f"```{{command}} {name}\n```" in text
        assert examples(text), name
        assert all(example[:4] == ["python", "-m", "flashcute", name] for example in examples(text))


def examples(text: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line[:3] == ["python", "-m", "flashcute"]]


def test_examples_of_commands_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    """An option in a page that the program does not have (any more)."""
    pages = [*PAGES.glob("*.md"), *(ROOT / "docs" / "start").glob("*.md")]
    found = [(page, line) for page in pages for line in examples(page.read_text())]
    assert len(found) > 15
    for page, line in found:
        try:
            command_parser().parse_args(line[3:])
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(line)}: {capsys.readouterr().err}")


def test_options_are_those_of_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the extension does not show, or shows without its argument."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    extension = importlib.import_module("command_line")
    for name, command in extension.commands_of(command_parser()).items():
        assert command.summary, name
        told = [
            option
            for group in command.parser._action_groups
            for action in extension.shown(group._group_actions)
            for option in extension.names_of(action)
        ]
        usage = command.parser.format_help()
        for option in told:
            assert option.partition(" ")[0] in usage or option[0] != "-", (name, option)
    cache = extension.commands_of(command_parser())["cache"].parser
    [action] = extension.shown(cache._positionals._group_actions)
    assert extension.names_of(action) == ["[list|check|clear]"]


# ---- special cases -------------------------------------------------------------------------------


def test_special_cases_name_tests_that_exist() -> None:
    """A row whose test was renamed or removed: nobody would know whether it holds."""
    text = text_of("semantics.md")
    named = re.findall(r"\]\((\S+?\.py)#(\w+)\)", text)
    assert len(named) > 60
    for path, test in named:
        assert f"def {test}(" in (PAGES / path).read_text(), f"{path} has no {test}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 40
    for row in rows:
        shown_by = row.rstrip("| ").rpartition("|")[2]
        assert "](" in shown_by or shown_by.strip() in ("-", ""), row


# ---- messages ------------------------------------------------------------------------------------


def test_messages_of_arguments_have_three_parts() -> None:
    """A message that does not name the argument, what is allowed and what came."""
    for group in (errors.arrays, errors.options):
        for case in group():
            message = str(errors.raised(case))
            assert re.match(r"\w+: expected .*, got ", message), message


def test_a_call_that_raises_nothing_is_no_message() -> None:
    """A table that keeps a message of a check that is gone."""
    with pytest.raises(ValueError, match="raised nothing"):
        errors.raised(errors.Case("attend()", errors.attend))


def test_without_torch_its_messages_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that loses a table where torch is not installed."""
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    kept = errors.messages("torch")
    assert "second derivative" in kept
    assert kept in text_of("errors.md")


def test_every_exception_is_explained() -> None:
    """A class that was added."""
    text = text_of("errors.md")
    for kind in fc.FlashcuteError.__subclasses__():
        builtin = kind.__mro__[2].__name__
        assert f"| `{kind.__name__}` | `{builtin}` |" in text


# ---- the glossary and the quick reference ----------------------------------------------------------


def test_the_glossary_has_cards() -> None:
    """A term without a place in the code, or that the list at the beginning leaves out."""
    text = text_of("glossary.md")
    begin, *cards = re.split(r"^### ", text, flags=re.MULTILINE)
    terms = [card.partition("\n")[0] for card in cards]
    assert len(set(terms)) == len(terms) >= 40
    listed = re.findall(r"\[([^\]]+)\]\(#", begin)
    assert [re.sub(r"\s+", " ", x) for x in listed] == sorted(terms, key=str.lower)
    for card in cards:
        assert re.search(r"^Code: \[.*\. More: \[.*\.$", card, re.MULTILINE), card
        assert "](../../" in card


def test_other_targets_take_the_defaults_that_the_page_says() -> None:
    """8.9 and 12.0 those of 8.6, and 8.7 those of 8.0."""
    same = {"sm_89": "sm_86", "sm_120": "sm_86", "sm_87": "sm_80"}
    for other, shown in same.items():
        for head_dim in reference.HEAD_DIMS:
            assert fc.default_config(head_dim, "bfloat16", other) == fc.default_config(
                head_dim, "bfloat16", shown
            )
            for deterministic in (False, True):
                both = [
                    fc.default_backward_config(head_dim, "bfloat16", x, deterministic=deterministic)
                    for x in (other, shown)
                ]
                assert both[0] == both[1]


def test_arguments_of_the_quick_reference_are_all_of_them() -> None:
    """An argument of flash_attention that was added."""
    text = text_of("quick_reference.md")
    table = text[text.index("## Arguments") :].partition("| the mask of")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M))))
    arguments = set(inspect.signature(fc.flash_attention).parameters)
    assert arguments - named == {"max_seqlen_q", "max_seqlen_k", "dropout_p"}
    assert named <= arguments


# ---- what is compiled ahead of time ----------------------------------------------------------------

WINDOW = fc.Variant(window=(5, 0))
MAP = fc.Variant(block_mask=fc.BlockMask.from_dense(np.ones((1, 1), bool)))


def forward(dtype: str, head_dim: int = 128, **options: Any) -> fc.ForwardConfig:
    return fc.default_config(head_dim, dtype, "sm_80").replace(**options)


def backward(dtype: str, arch: str = "sm_80", d: int = 128, **options: Any) -> fc.BackwardConfig:
    return fc.default_backward_config(d, dtype, arch, **options)


AHEAD_OF_TIME: dict[str, list[tuple[Any, str, fc.Variant | None]]] = {
    "float16 and bfloat16: full and causal, forward and gradients": [
        (make(dtype), "sm_80", None) for make in (forward, backward) for dtype in ("float16", "bfloat16")
    ],
    "float32: full and causal, forward": [(forward("float32"), "sm_80", None)],
    "bfloat16: windows, prefixes, lengths, packed sequences, sinks, masks by element; forward and gradients": [
        *((make("bfloat16"), "sm_80", mask) for make in (forward, backward) for mask in (WINDOW, MAP)),
        *((backward("bfloat16", "sm_90", d), "sm_90", mask) for d in (64, 128) for mask in (WINDOW, MAP)),
    ],
    "the same of float16 and float32": [
        (forward("float16"), "sm_80", WINDOW),
        (forward("float32"), "sm_80", WINDOW),
        (backward("float16", "sm_90"), "sm_90", WINDOW),
    ],
    "gradients of float32": [(backward("float32"), "sm_80", None)],
    "deterministic gradients on Hopper: full and causal, bfloat16; float16 above head dimension 192": [
        (backward(dtype, "sm_90", d, deterministic=True), "sm_90", None)
        for dtype, dims in {"bfloat16": (64, 128, 160, 256), "float16": (256,)}.items()
        for d in dims
    ],
    "deterministic gradients otherwise": [
        (backward("bfloat16", deterministic=True), "sm_80", None),
        (backward("float16", "sm_90", 128, deterministic=True), "sm_90", None),
    ],
    "gradients above head dimension 128 on compute capability 8.6, 8.9 and 12.0": [
        (backward("bfloat16", arch, 256), arch, None) for arch in ("sm_86", "sm_89", "sm_120")
    ],
    "addresses or strides that are not multiples of 16 bytes": [
        (forward("bfloat16", copy_bytes=8), "sm_80", None)
    ],
    "configurations of your own, `count_blocks`": [(forward("bfloat16", block_n=32), "sm_80", None)],
}  # fmt: skip


@pytest.mark.skipif(
    "80" not in fc._core.build_info().image_archs.split(), reason="built without these images"
)
def test_what_is_compiled_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that a user is told to have, and waits for; or one that is there without being told."""
    monkeypatch.setenv("FLASHCUTE_JIT", "off")
    page = (ROOT / "docs" / "start" / "compile.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]*) \| (ahead of time|at first use) \|$", page, re.M))
    assert rows.keys() == AHEAD_OF_TIME.keys()
    for row, kernels in AHEAD_OF_TIME.items():
        for cfg, arch, variant in kernels:
            if rows[row] == "ahead of time":
                assert set(fc.prebuild(cfg, arch, variant=variant).values()) == {"ahead of time"}
            else:
                with pytest.raises(fc.UnsupportedError, match="no ahead-of-time image"):
                    fc.prebuild(cfg, arch, variant=variant)
