"""What tests of commands share: proofs that they make are theirs, and are made once (launcher/proofs.py); pages."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.cli import main


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls ``shoestring report`` on a folder; gives the page, or what the command complains about."""

    def call(run: Path, *words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["report", str(run), *words]) == code
        printed = capsys.readouterr()
        if code:
            return printed.err
        said = re.fullmatch(r"(.*): ([\d,]+) kB, for any browser\n", printed.out)
        assert said is not None, printed.out
        content = Path(said[1]).read_bytes()
        assert round(len(content) / 1000) == int(said[2].replace(",", ""))
        assert not list(Path(said[1]).parent.glob("*.partial"))
        return content.decode()

    return call
