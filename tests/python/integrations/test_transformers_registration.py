"""How flashcute is made known to transformers, and what stands in the way."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import flashcute as fc
import optional_torch
import pytest
from flashcute.integrations.transformers import register

needs_transformers = pytest.mark.skipif(
    not optional_torch.available or importlib.util.find_spec("transformers") is None,
    reason="needs torch and transformers",
)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("flashcute", "FlashAttention"),
        ("my_sdpa", "torch's attention"),
        ("flex_attention", "FlexAttention"),
        ("eager", "plain torch"),
        ("org/kernel", "download"),
        ("kernel:function", "download"),
        ("paged|fcute", "continuous batching"),
    ],
)
def test_names_that_mean_something_else_are_refused(name: str, meaning: str) -> None:
    """A name that makes transformers download a kernel when the model is built."""
    with pytest.raises(fc.ArgumentError, match=f"^name: expected one without .*{meaning}"):
        register(name)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_string(name: object) -> None:
    with pytest.raises(fc.ArgumentError, match=r"^name: expected a string"):
        register(name)  # type: ignore[arg-type]


def test_settings_are_checked() -> None:
    """A misspelt setting that is taken for the default."""
    with pytest.raises(fc.ArgumentError, match=r"^on_unsupported: expected 'warn', .*'ignore'"):
        register(on_unsupported="ignore")
    for accept in ("position_ids", 3, [3]):
        with pytest.raises(fc.ArgumentError, match=r"^accept: expected a list of names"):
            register(accept=accept)  # type: ignore[arg-type]
    with pytest.raises(fc.ArgumentError, match=r"^accept: .* changes no score, got 'softcap'"):
        register(accept=["softcap"])


@needs_transformers
def test_names_of_others_are_left_alone() -> None:
    """Another library's attention that is replaced without a word."""
    import transformers

    def theirs() -> None: ...

    transformers.AttentionInterface.register("theirs", theirs)
    with pytest.raises(fc.ArgumentError, match=r"^name: expected a free one, got 'theirs'"):
        register("theirs")
    assert transformers.AttentionInterface()["theirs"] is theirs


@needs_transformers
def test_a_second_registration_replaces_the_first() -> None:
    """An import that fails because another module has registered already."""
    import transformers

    register("fcute_twice")
    before = transformers.AttentionInterface()["fcute_twice"]
    register("fcute_twice", on_unsupported="error")
    assert transformers.AttentionInterface()["fcute_twice"] is not before
    assert "fcute_twice" in transformers.AttentionMaskInterface().valid_keys()


def test_without_transformers(fresh: Callable[..., object]) -> None:
    """A traceback from within transformers, or an import of it by flashcute alone."""
    fresh("""
        import sys
        sys.modules["transformers"] = None
        import flashcute
        from flashcute.integrations.transformers import register
        assert "torch" not in sys.modules
        try:
            register()
        except flashcute.UnsupportedError as error:
            assert "pip install transformers" in str(error), error
        else:
            raise AssertionError
    """)


def test_a_version_that_is_too_old(fresh: Callable[..., object]) -> None:
    """Names of version 4 that are there, with other arguments; or that are not there."""
    fresh("""
        import sys, types
        import flashcute
        from flashcute.integrations.transformers import register

        old, masking = types.ModuleType("transformers"), types.ModuleType("transformers.masking_utils")
        old.__version__, old.__path__ = "4.48.0", []
        sys.modules["transformers"] = old
        messages = []
        for step in range(3):
            if step == 1:
                sys.modules["transformers.masking_utils"] = masking
            if step == 2:
                masking.sdpa_mask = lambda batch_size, cache_position, kv_length: None
                old.AttentionInterface = old.AttentionMaskInterface = object
            try:
                register()
            except flashcute.UnsupportedError as error:
                messages.append(str(error))
        assert len(messages) == 3 and all("version 5.4" in x and "4.48.0" in x for x in messages), messages
    """)
