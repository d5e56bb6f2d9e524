"""What comes of all that was measured: findings, who is unfit, and the words for it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from configs.preflight import OnFailure
from configs.schema import RunConfig
from launcher.preflight.checks import find_needs, list_checks
from launcher.preflight.judge import Check, Finding, Sample, judge, name_unfit
from launcher.preflight.report import VERSION, show_findings, show_table
from launcher.preflight.unfit import EXCLUDED


class Scale(NamedTuple):
    """How large the run is."""

    world: int
    here: int  # ranks of a machine
    kind: str  # of the devices that are computed on


class Verdict(NamedTuple):
    """All of it."""

    checks: Sequence[Check]
    samples: Mapping[str, Sequence[Sample]]
    findings: Sequence[Finding]

    @property
    def unfit(self) -> dict[str, str]:
        """The machines that are, each with why."""
        return name_unfit(self.findings)

    def show(self, machines: int, seconds: float, table: bool) -> str:
        """For people; the ``table`` of all checks comes with any finding."""
        measured = sum(check.name in self.samples for check in self.checks)
        counted = f"{_count(measured, 'check')}, {_count(len(self.findings), 'finding')}"
        parts = [show_table(self.checks, self.samples, self.findings)] if table or self.findings else []
        parts += [show_findings(self.findings)] if self.findings else []
        return "\n".join([*parts, f"preflight: {_count(machines, 'machine')}, {counted}, {seconds:.1f} s"])

    def refuse(self, how: OnFailure) -> str:
        """Why the run does not start, in a line."""
        unfit = sorted(self.unfit)
        who = f"machine{'s' * (len(unfit) > 1)} {', '.join(unfit)} unfit" if unfit else "no machine unfit by itself"
        what = "see above; preflight.on_failure=warn starts all the same"
        if unfit and how is OnFailure.exclude:
            what = f"named in {EXCLUDED}, for the next attempt to do without"
        return f"preflight: {_count(len(self.findings), 'finding')}, {who}: {what}"


def reach(config: RunConfig, scale: Scale, samples: Mapping[str, Sequence[Sample]]) -> Verdict:
    """The verdict on ``samples``, by the name of their check, for a run."""
    needs = find_needs(config, scale.world, scale.here, scale.kind != "cpu")
    versions = sorted(name for name in samples if name.startswith(VERSION))
    checks = list_checks(config.preflight, needs, versions, scale.kind)
    return Verdict(checks, samples, judge(checks, samples))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
