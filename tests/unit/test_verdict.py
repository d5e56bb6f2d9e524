"""The verdict of a proof: the largest difference of each kind, and what nobody compared does not pass."""

from training.proof.report import LIMITS, Difference, Report, summarise


def compared(size: float = 0.0, without: str = "") -> Report:
    """Two differences of each kind, the second larger."""
    found = [
        Difference(what, number * size, f"place {number}") for what in LIMITS if what != without for number in (1, 2)
    ]
    return Report(tuple(summarise(found, LIMITS)))


def test_the_largest_difference_counts() -> None:
    assert compared().passed
    report = compared(1e-12)
    assert not report.passed
    assert all(row.where == "place 2" and row.compared == 2 for row in report.rows)
    assert {row.what for row in report.rows if row.passed} == {what for what in LIMITS if LIMITS[what] >= 2e-12}


def test_what_was_not_compared_does_not_pass() -> None:
    for what in LIMITS:
        report = compared(without=what)
        # A model without routers has no selection biases.
        assert report.passed == (what == "selection biases"), what
        assert "FAILED" in str(report) or report.passed
