"""Which mode to use, in a paragraph of plain words, from the figures of each; pure.

A mode with missed deadlines is not to be used: the robot held an old action or stood. Of those that keep them the one
that learns fastest is the best; where two learn alike, the one with less between robot and learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .stagetable import short_ms

__all__ = ["ModeFacts", "advise"]

ALIKE = 0.9  # of the fastest's updates per second: runs of seconds tell no smaller differences
HELD_UP = 0.25  # of the cycle: if the idle sentinel's p99 is later than this, others use the machine

CLOSENESS = ("local-only", "remote-local", "remote-only")  # the least between robot and learner first


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeFacts:
    """What counts of a mode; None is what is not known, or is not there."""

    mode: str
    cycle_ms: float | None = None
    overruns: int = 0  # not shared with a process that does nothing
    shared_overruns: int = 0
    late_actions: int = 0
    steps: int = 0
    cycle_left: float | None = None
    updates_per_s: float | None = None
    policy_age_ms: float | None = None  # median
    answer_ms: tuple[float, float] | None = None  # p50, p99 of a question's way and back; where the learner acts
    sentinel_ms: float | None = None  # p99
    error: str = ""

    @property
    def sound(self) -> bool:
        return not (self.error or self.overruns or self.late_actions) and self.steps > 0


def advise(modes: Sequence[ModeFacts], *, link: str | None, learner: str | None) -> str:
    """One paragraph.

    Args:
        link: the emulated link, None for the link as it is.
        learner: the address of a learner that ran already; None if each mode had its own on this host.
    """
    measured = [facts for facts in modes if facts.steps and not facts.error]
    if not measured:
        return "No mode could be measured here, so there is nothing to advise."
    sound = sorted((facts for facts in measured if facts.sound), key=_rank)
    where = "on this machine" + (f" and link ({link})" if link else "")
    told = []
    if sound:
        fastest = max(facts.updates_per_s or 0.0 for facts in sound)
        best = next(facts for facts in sound if (facts.updates_per_s or 0.0) >= ALIKE * fastest)
        with_whom = f", with {learner}" if learner and best.mode != "local-only" else ""
        told.append(
            f"Use {best.mode} {where}{with_whom}: it kept every deadline{_cycle(best)}"
            f"{_budget(best)}{_learning(best)}.{_price(best)}"
        )
        others = [facts for facts in sound if facts is not best]
        told += [
            f"{facts.mode} kept its deadlines too{_budget(facts)}{_learning(facts)}.{_price(facts)}" for facts in others
        ]
    else:
        best = min(measured, key=lambda facts: ((facts.overruns + facts.late_actions) / facts.steps, _rank(facts)))
        told.append(f"No mode kept all deadlines {where}; {best.mode} came closest.")
    told += [_fault(facts) for facts in measured if not facts.sound]
    told += [f"{facts.mode} could not be measured: {facts.error}." for facts in modes if facts not in measured]
    if learner is None and any(facts.mode != "local-only" for facts in measured):
        told.append("Robot and learner shared this machine; a stronger learner elsewhere is measured with --learner.")
    told += _busy(measured)
    return " ".join(told)


def _rank(facts: ModeFacts) -> int:
    return CLOSENESS.index(facts.mode) if facts.mode in CLOSENESS else len(CLOSENESS)


def _cycle(facts: ModeFacts) -> str:
    return f" of {facts.cycle_ms:g} ms" if facts.cycle_ms else ""


def _budget(facts: ModeFacts) -> str:
    but = f" but {facts.shared_overruns}, for which an idle process was late as well," if facts.shared_overruns else ""
    left = ""
    if facts.cycle_left is not None:
        left = f" with {100 * facts.cycle_left:.0f} % of the cycle left at the 99th percentile"
    return f"{but}{left}"


def _learning(facts: ModeFacts) -> str:
    if not facts.updates_per_s:
        return ", but the learner made no update while it was measured"
    policy = f"policies {facts.policy_age_ms / 1000:.2g} s old" if facts.policy_age_ms else "the newest policy"
    return f", learned with {facts.updates_per_s:.3g} updates/s and acted by {policy}"


def _price(facts: ModeFacts) -> str:
    if facts.answer_ms is None:
        return ""
    return f" Each of its actions waits for a round trip: {_pair(facts.answer_ms)}."


def _fault(facts: ModeFacts) -> str:
    misses = []
    if facts.overruns:
        misses.append(f"{facts.overruns} of its {facts.steps} cycles overran")
    if facts.late_actions:
        misses.append(f"{facts.late_actions} of {facts.steps} actions came after the next deadline")
    why = ""
    if facts.answer_ms is not None and facts.cycle_ms is not None and facts.answer_ms[1] > facts.cycle_ms / 2:
        why = f"; an answer took {_pair(facts.answer_ms)} of a cycle of {facts.cycle_ms:g} ms"
    return f"{facts.mode} is not to be used: {' and '.join(misses)}{why}."


def _pair(pair_ms: tuple[float, float]) -> str:
    return f"{short_ms(pair_ms[0])} ms (median), {short_ms(pair_ms[1])} ms (p99)"


def _busy(measured: Sequence[ModeFacts]) -> list[str]:
    held_up = [
        facts
        for facts in measured
        if facts.shared_overruns or (facts.sentinel_ms or 0.0) > HELD_UP * (facts.cycle_ms or float("inf"))
    ]
    if not held_up:
        return []
    worst = max(facts.sentinel_ms or 0.0 for facts in held_up)
    late = f"a process that does nothing woke {short_ms(worst)} ms late (p99)"
    return [f"The machine was busy with other work: {late}; measure again when it is quiet."]
