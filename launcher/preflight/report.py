"""What people see of the checks: a table of all, then who is unfit, why, and what to do."""

from collections.abc import Iterable, Mapping, Sequence

from launcher.preflight.judge import Check, Finding, Sample

VERSION = "version of "


def show_table(checks: Iterable[Check], samples: Mapping[str, Sequence[Sample]], findings: Sequence[Finding]) -> str:
    """A line for each check that something was measured for: from the least to the most. Versions in one line."""
    failed = {finding.check for finding in findings}
    lines, versions = [], 0
    for check in checks:
        values = [sample.value for sample in samples.get(check.name, ()) if sample.value is not None]
        if not values:
            continue
        if check.name.startswith(VERSION) and check.name not in failed:
            versions += 1
            continue
        mark = "FAILED" if check.name in failed else "ok"
        lines.append(f"{mark:<7} {check.name:<22} {_show_range(check, values)}")
    if versions:
        lines.append(f"{'ok':<7} {'versions':<22} {versions}, each the same everywhere")
    return "\n".join(lines)


def show_findings(findings: Sequence[Finding]) -> str:
    """Two lines for each: what, and what to do."""
    return "\n".join(f"{finding.describe()}\n    {finding.hint}" for finding in findings)


def _show_range(check: Check, values: Sequence[float | str | None]) -> str:
    if all(isinstance(value, str | bool) for value in values):
        said = sorted({str(value) for value in values if value})
        return ", ".join(said) or f"none of {len(values)}"
    numbers = [value for value in values if isinstance(value, int | float)]
    least, most = check.write(min(numbers)), check.write(max(numbers))
    return f"{least}  ({len(numbers)})" if least == most else f"{least} to {most}  ({len(numbers)})"
