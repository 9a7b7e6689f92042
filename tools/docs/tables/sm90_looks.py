"""Tables of how tiles of Hopper's deterministic gradients look whether it is their turn to add."""

from __future__ import annotations

from tables.compared_builds import by_turns

FILE = "gpu_sm90_deterministic_looks"


def looks(group: str) -> str:
    """The time with acquiring looks over the time without; `group`: query heads that share a key head."""
    return by_turns(FILE, "looks", kv_ratio=int(group))


def tried(run: str) -> str:
    return by_turns(FILE, run)
