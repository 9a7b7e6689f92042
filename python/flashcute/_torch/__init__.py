"""What torch wants of a call beside its result: gradients, operators to trace, autocast, its own attention.

Loaded as soon as torch is, so that saved programs find the operators. Eager calls go through an autograd.Function;
torch.compile and torch.export see the operators `flashcute::flash_attention_forward` and
`flashcute::flash_attention_backward`, which cost more per call.
"""

from __future__ import annotations

from .._import_hook import when_imported
from .dispatch import attend, explained
from .problem import Problem
from .sharding import register_shardings

__all__ = ["Problem", "attend", "explained"]

when_imported("torch.distributed.tensor", register_shardings)
