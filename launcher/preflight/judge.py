"""Who is unfit: rules over what all machines have measured. Pure functions, no process.

    Sample   whose it is, of what there, the value          ("n2", "rank 5", 12.3)
    Check    a name, a rule, how a value is written, what to do about it
    rule     values of all --> a word for each about what is wrong with it, "" where nothing is

    equal         as most have it                           versions, numbers of devices
    at_least      not below a floor                         free space, open files
    near          within a factor of the median of its peers: only who is slower is named
    within        not further from the one in the middle     clocks
    like_the_best what the best of its peers have           links that are up
    nothing       what there should be none of              errors of memory
    anything      what is shown and not judged              messages inside a machine

What was not measured, None, is not judged and is nobody's peer.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

Value = float | str | None
Write = Callable[[Any], str]
Rule = Callable[[Sequence[Any], Write], list[str]]


class Sample(NamedTuple):
    """A value."""

    nodes: tuple[str, ...]  # whose: several share what was measured between them
    subject: str  # what of theirs: "rank 3", "device 2", or "" for the machine
    value: Value


@dataclass(frozen=True, slots=True)
class Check:
    """How the values of one kind are judged."""

    name: str
    rule: Rule
    form: str  # of a value, as ``str.format`` takes it
    hint: str  # what to do where it fails

    def write(self, value: Any) -> str:
        """A value in words."""
        return self.form.format(value)


class Finding(NamedTuple):
    """That something is wrong."""

    nodes: tuple[str, ...]
    subject: str
    check: str
    words: str
    hint: str

    def describe(self) -> str:
        """In a line."""
        return f"{self.where}: {self.check}: {self.words}"

    @property
    def where(self) -> str:
        """Whose it is."""
        return ", ".join(filter(None, (" and ".join(self.nodes), self.subject)))


def judge(checks: Iterable[Check], samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
    """What is wrong with ``samples``, by the name of their check."""
    found = []
    for check in checks:
        known = [sample for sample in samples.get(check.name, ()) if sample.value is not None]
        words = check.rule([sample.value for sample in known], check.write)
        found += [
            Finding(sample.nodes, sample.subject, check.name, wrong, check.hint)
            for sample, wrong in zip(known, words, strict=True)
            if wrong
        ]
    return found


def name_unfit(findings: Iterable[Finding]) -> dict[str, str]:
    """The machines that a finding is about, and no other one with them: each with why."""
    unfit: dict[str, str] = {}
    for finding in findings:
        if len(finding.nodes) == 1:
            (node,) = finding.nodes
            reason = f"{finding.subject}: {finding.check}: {finding.words}".removeprefix(": ")
            unfit[node] = f"{unfit[node]}; {reason}" if node in unfit else reason
    return unfit


def equal(values: Sequence[Any], write: Write) -> list[str]:
    """All have the same; where as many have one as another, what the first of them has is right."""
    counts = Counter(values)
    if len(counts) < 2:
        return [""] * len(values)
    usual, often = counts.most_common(1)[0]
    return ["" if value == usual else f"{write(value)}, {write(usual)} on {often} of {len(values)}" for value in values]


def at_least(floor: float) -> Rule:
    """None is below ``floor``."""

    def rule(values: Sequence[Any], write: Write) -> list[str]:
        return [f"{write(value)}, should be at least {write(floor)}" if value < floor else "" for value in values]

    return rule


def near(factor: float, larger_is_better: bool = True, slack: float = 0.0) -> Rule:
    """None is worse than the median of the others by more than ``factor``, and then some ``slack``."""

    def rule(values: Sequence[Any], write: Write) -> list[str]:
        if len(values) < 2:
            return [""] * len(values)
        ordered, words = sorted(values), []
        for value in values:
            place = bisect_left(ordered, value)
            peers = median(ordered[:place] + ordered[place + 1 :])
            worse = value * factor < peers - slack if larger_is_better else value > peers * factor + slack
            words.append(f"{write(value)}, its peers {write(peers)}" if worse else "")
        return words

    return rule


def within(limit: float) -> Rule:
    """None is further than ``limit`` from the one in the middle; of two, the first is right."""

    def rule(values: Sequence[Any], write: Write) -> list[str]:
        middle = min(values, key=lambda value: sum(abs(value - other) for other in values), default=0.0)
        return [f"{write(value - middle)} from the others" if abs(value - middle) > limit else "" for value in values]

    return rule


def like_the_best(values: Sequence[Any], write: Write) -> list[str]:
    """None is below what another one has."""
    best = max(values, default=0)
    return [f"{write(value)}, others {write(best)}" if value < best else "" for value in values]


def anything(values: Sequence[Any], write: Write) -> list[str]:
    """All is well: what is shown alone."""
    return [""] * len(values)


def nothing(values: Sequence[Any], write: Write) -> list[str]:
    """None has any."""
    return [write(value) if value else "" for value in values]


def together(*rules: Rule) -> Rule:
    """Several rules; what the first says that has something to say."""

    def rule(values: Sequence[Any], write: Write) -> list[str]:
        return [next(filter(None, words), "") for words in zip(*(each(values, write) for each in rules), strict=True)]

    return rule
