"""Pages of runs in a real browser, on phones and on desks, light and dark: nothing sticks out, nothing is fetched.

Without Chromium these tests are skipped, unless SHOESTRING_BROWSER=required (Debian: chromium-headless-shell).
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser, open_browser
from page_runs import DENSE, large, load, make_run, start, step

Report = Callable[..., str]
WIDTHS = (1280, 700, 400, 320)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        if os.environ.get("SHOESTRING_BROWSER") == "required":
            pytest.fail("no browser: apt-get install chromium-headless-shell")
        pytest.skip("no browser")
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def write(report: Report, run: Path) -> Path:
    report(run)
    return run / "report.html"


def check_everywhere(browser: Browser, page: Path) -> None:
    for width in WIDTHS:
        for dark in (False, True):
            shown = browser.show(page, width, dark)
            assert shown.overflow == shown.overlap == shown.complaints == shown.requests == [], (width, dark)
            assert shown.height > 800


def test_a_large_run(browser: Browser, report: Report, tmp_path: Path) -> None:
    """Long words, many layers, restarts, many attempts."""
    page = write(report, large(tmp_path / ("run-with-a-very-long-name-" * 4)))
    check_everywhere(browser, page)
    browser.show(page, 400)
    assert browser.evaluate("document.querySelectorAll('svg.map path').length") >= 5
    assert browser.evaluate(
        "[...document.querySelectorAll('.plot svg')].every(e => e.clientHeight > 40 && e.clientWidth > 200)"
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 60])
def test_a_small_run(browser: Browser, report: Report, tmp_path: Path, steps: int) -> None:
    rows = [start(), *(row for number in range(steps) for row in (load(number), step(number)))]
    run = make_run(tmp_path / "run", rows)
    (run / "schedule.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="90"><rect width="9"/></svg>'
    )
    check_everywhere(browser, write(report, run))


def test_numbers_of_all_sizes(browser: Browser, report: Report, tmp_path: Path) -> None:
    """Marks of axes have room whatever their numbers are."""
    sizes = ((1e-9, 1e-12), (123456.0, 5e13), (0.0, 1e-4), (1e9, 3.0))
    for place, (high, low) in enumerate(sizes):
        rows = [
            step(
                number,
                loss=low + high * number,
                grad_norm=high + low * number,
                lr=low,
                peak_memory=2**50,
                tokens_per_second=high,
            )
            for number in range(30)
        ]
        check_everywhere(browser, write(report, make_run(tmp_path / str(place), [start(), *rows], DENSE)))


def test_dark_is_dark(browser: Browser, report: Report, tmp_path: Path) -> None:
    page = write(report, make_run(tmp_path / "run", [start(), step(0)]))
    colours = []
    for dark in (False, True):
        browser.show(page, 400, dark)
        colours.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]


def test_faults_are_noticed(browser: Browser, report: Report, tmp_path: Path) -> None:
    """Something wide, something fetched, marks on each other, a script: the page forbids it, and this test sees it."""
    run = make_run(tmp_path / "run", [start(), *map(step, range(30))])
    page, text = run / "broken.html", report(run)
    page.write_text(text.replace("<footer>", '<div style="width:900px">wide</div><footer>'))
    assert browser.show(page, 400).overflow and not browser.show(page, 1280).overflow
    page.write_text(
        text.replace("<footer>", '<img src="http://127.0.0.1:9/x.png"><script>document.title = "ran"</script><footer>')
    )
    shown = browser.show(page, 1280)
    assert len(shown.complaints) == 2 and all("Content Security Policy" in each for each in shown.complaints)
    assert browser.evaluate("document.title") != "ran"
    page.write_text(text.replace('<span style="left:', '<span data-x="left:'))
    assert browser.show(page, 1280).overlap
