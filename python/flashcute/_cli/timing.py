"""How long calls take: samples in rounds, so that what is compared shares the machine's moods."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from .kits import Call, Kit

SAMPLES_PER_ROUND = 10
MOST_CALLS_PER_ROUND = 500


def interleaved_ms(
    kit: Kit,
    calls: Mapping[str, Call],
    rounds: int,
    budget_ms: float,
    on_round: Callable[[int], object] = lambda number: None,
) -> dict[str, list[float]]:
    """Samples of the milliseconds per call, for every call by its name.

    In each round every call has its turn of about `budget_ms`, at least two calls, cut into up to
    SAMPLES_PER_ROUND samples. A sample is the mean over calls in a row. The order of turns is
    another in every round: who follows the hungriest finds a hot machine and a low clock.

    on_round: called before each round with its number, from 1; never between turns, whose pauses would differ.
    """
    plans: dict[str, tuple[int, int]] = {}
    for name, call in calls.items():
        one = kit.samples_ms(call, 1, 1)[0]
        count = max(2, min(MOST_CALLS_PER_ROUND, int(budget_ms / max(one, 1e-6))))
        samples = min(count, SAMPLES_PER_ROUND)
        plans[name] = samples, count // samples
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1, rounds + 1):
        on_round(number)
        for name in random.sample(list(calls), len(calls)):
            times[name] += kit.samples_ms(calls[name], *plans[name])
    return times
