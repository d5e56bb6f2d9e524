"""Every kernel compiles ahead of time for three targets, without a device; what comes out is read."""

import importlib.metadata
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from launcher import cli
from launcher import kernels as verb
from model.kernels import cases as model_cases
from model.kernels.chips import CHIPS, Unit, Work
from model.kernels.compile import Case, Compiled, count_bytes
from parallel.kernels import cases as parallel_cases

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
TARGETS = ("cuda:90", "cuda:100", "hip:gfx942")
PRODUCTS = ("gather_matmul", "matmul_scatter")
UNITS = {"cuda:90": "wgmma.mma_async", "cuda:100": "tcgen05.mma", "hip:gfx942": "v_mfma_f32"}
WAIT = ("gather_matmul", "sum_slots", "combine", "await_flags")
STORE = ("matmul_scatter", "dispatch")
RAISE = (*STORE, "announce", "mark")
COMPILE = """
import pickle, sys
from model.kernels import cases as ours
from model.kernels.compile import compile_cases
from parallel.kernels import cases
target = sys.argv[1]
sample = [c for c in ours.list_cases(ours.Inputs(target)) if c.shipped and c.name in ("rows", "quantise, runs")]
made = list(compile_cases(target, [*cases.list_cases(target), *sample]))
rows = {c.case.name: (c.registers, c.spills, c.shared, c.text, c.binary, c.faults(), c.instruction) for c in made}
sys.stdout.buffer.write(pickle.dumps(rows))
"""


class Kernel(NamedTuple):
    """What was read of one."""

    registers: int
    spills: int
    shared: int
    text: str
    binary: bytes
    faults: list[str]
    instruction: str


class Built(NamedTuple):
    """Those that communicate and a sample of the others, for a target."""

    target: str
    kernels: dict[str, Kernel]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Python in a process that does nothing else, with an empty cache."""
    return subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"},
        capture_output=True,
    )


@pytest.fixture(scope="module", params=[TARGETS[0], *(pytest.param(t, marks=pytest.mark.full) for t in TARGETS[1:])])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """For each target in turn."""
    done = run(tmp_path_factory.mktemp("triton"), "-c", COMPILE, request.param)
    assert done.returncode == 0, done.stderr.decode()
    return Built(request.param, {name: Kernel(*row) for name, row in pickle.loads(done.stdout).items()})  # noqa: S301


def list_ours(target: str) -> list[Case]:
    return model_cases.list_cases(model_cases.Inputs(target))


def test_every_kernel_is_among_the_cases() -> None:
    for list_cases, folder in ((list_ours, "model/kernels"), (parallel_cases.list_cases, "parallel/kernels")):
        texts = [path.read_text() for path in (ROOT / folder).glob("*.py")]
        launched = {name for text in texts for name in re.findall(r"\b(_\w+)\[(?:grid\]|\()", text)}
        compiled = {case.kernel.fn.__name__ for target in TARGETS for case in list_cases(target)}
        assert launched == compiled, "a kernel that nothing compiles"


def test_binaries_are_for_their_target(built: Built) -> None:
    assert {*WAIT, *RAISE} < set(built.kernels)
    for name, kernel in built.kernels.items():
        assert kernel.binary[:4] == b"\x7fELF" and kernel.registers > 0, name
        assert kernel.spills == 0 and not kernel.faults, f"{name}: {kernel.faults}"
        assert kernel.shared <= CHIPS[built.target].shared, name


def test_products_use_the_matrix_units(built: Built) -> None:
    for name in (*PRODUCTS, "rows"):
        kernel = built.kernels[name]
        assert UNITS[built.target] in kernel.text and kernel.instruction in kernel.text
        # The accelerator's loads would need more than these flags to be ordered behind a peer's stores.
        assert "cp.async.bulk" not in kernel.text and "tensor.1d" not in kernel.text
    assert re.search("e4m3.*e4m3|f8f6f4|fp8_fp8", built.kernels["rows"].instruction)
    assert not built.kernels["quantise, runs"].instruction


@pytest.mark.parametrize("name", WAIT)
def test_waits_acquire_from_the_system(built: Built, name: str) -> None:
    text = built.kernels[name].text
    if built.target.startswith("hip"):
        acquired = r"global_atomic_cmpswap .* sc0 sc1\n\s*s_waitcnt vmcnt\(0\)\n\s*buffer_inv sc0 sc1\n"
        assert re.search(acquired, text)
        return
    poll = text.index("atom.global.acquire.sys.cas.b32")
    leave = text.index("bra", poll)
    assert "bar.sync" in text[poll:leave], "all threads leave together"
    assert "ld.global.nc" not in text
    if name == "gather_matmul":
        assert text.index("cp.async.cg") > leave, "no load of a tile before its flag"


@pytest.mark.parametrize("name", RAISE)
def test_flags_are_raised_behind_the_stores_of_the_whole_program(built: Built, name: str) -> None:
    text = built.kernels[name].text
    if built.target.startswith("hip"):
        (written,) = (match.end() for match in re.finditer(r"\s+buffer_wbl2 sc0 sc1\ns_waitcnt vmcnt\(0\)\n", text))
        (flag,) = (match.start() for match in re.finditer(r"global_atomic_add .* sc1\n", text))
        assert written < flag and "global_store" not in text[written:flag]
        assert ("s_barrier" if name in STORE else "; wave barrier") in text[written:flag], "every wave has written back"
        assert "buffer_wbl2 sc0 sc1" in text[written:flag], "a release"
        return
    (flag,) = (match.start() for match in re.finditer(r"(?:red|atom)\.global\.sys\.release\.add\.u32", text))
    if name in STORE:
        # Stores of the loop before, which may come later in the text, or of this stretch without a jump.
        stretch = re.split(r"\$L__BB\S+:|st\.global", text[:flag])[-1]
        assert "bar.sync" in stretch
        assert "st.global.v4.b32" in text, "rows leave 16 bytes at a time"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_page_shows_what_is_printed(tmp_path: Path) -> None:
    """Every kernel in every configuration for every target: nothing that ships spills, or lacks the matrix units.

    The page has its kernels in any case, its figures where Triton is the version that it names.
    """
    done = run(tmp_path, "-m", "launcher.kernels")
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode()
    version, shown = re.search(r"^    Triton (\S+)\n((?:    .*\n|\n)+)", PAGE.read_text(), re.MULTILINE).groups()  # type: ignore[union-attr]
    shown, printed = textwrap.dedent(shown).strip(), printed.partition("\n")[2].strip()
    names = [[line.split("  ")[0] for line in text.splitlines()] for text in (shown, printed)]
    assert names[0] == names[1]
    assert shown == printed or version != importlib.metadata.version("triton")


def fake(**changes: Any) -> Compiled:
    """An FP8 product that could ship, but for ``changes``."""
    case = Case("rows", None, lambda: None, 1e9, 1000, Unit.fp8, "128x128x128")
    text = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
    return Compiled(case, Work(1e9, 1000, Unit.fp8), "cuda:90", 128, 0, 65536, 8, text, b"")._replace(**changes)


def test_what_must_not_ship_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake().faults() == []
    made = [
        fake(spills=16),
        fake(shared=232449),
        fake(text="mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
        fake(spills=8, case=fake().case._replace(shipped=False)),
    ]
    monkeypatch.setattr("model.kernels.compile.compile_cases", lambda target, cases: iter(made))
    assert cli.main(["kernels", "target=cuda:90"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "shoestring: rows: 128x128x128 on cuda:90 spills 16",
        "shoestring: rows: 128x128x128 on cuda:90 wants 232449 bytes of shared memory, and H100 has 232448",
        "shoestring: rows: 128x128x128 on cuda:90 does not use the matrix units for fp8",
    ]
    assert "(rows: 128x128x128)" in verb.write(made[-1])


def test_a_target_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "target=cuda:9"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("shoestring: target=cuda:9 is none of cuda:90, cuda:100, hip:gfx942")
    )


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "share"),
    [
        ("cuda:90", 255, 0, 8, 0.125),  # 2 warps of 256 registers a lane on a scheduler
        ("cuda:90", 128, 0, 8, 0.25),
        ("cuda:90", 32, 0, 4, 1.0),
        ("cuda:90", 32, 116000, 4, 4 / 64),  # one program, as two would want 234048 bytes
        ("cuda:90", 32, 115712, 4, 8 / 64),
        ("hip:gfx942", 128, 0, 4, 0.5),
        ("hip:gfx942", 129, 0, 4, 3 / 8),
        ("hip:gfx942", 64, 32768, 4, 8 / 32),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, share: float) -> None:
    """By the limits of the CUDA occupancy calculator for compute capability 9.0, and of CDNA 3."""
    assert CHIPS[target].occupancy(registers, shared, warps) == share


def test_bounds() -> None:
    """What takes longer: 2 x 128^3 operations at 1979 T/s, or 3 x 128^2 values at 3.35 TB/s."""
    cube = torch.empty(128, 128, dtype=torch.bfloat16, device="meta")
    assert count_bytes((cube, (cube, None), 5)) == 65541
    seconds, bound = Work(2 * 128**3, 3 * 128**2, Unit.fp8).bound(CHIPS["cuda:90"])
    assert bound == "memory" and seconds == pytest.approx(3 * 128**2 / 3.35e12)
    seconds, bound = Work(2 * 1024**3, 3 * 1024**2, Unit.fp8).bound(CHIPS["cuda:90"])
    assert bound == "fp8" and seconds == pytest.approx(2 * 1024**3 / 1979e12)


def test_files_that_the_page_names_exist() -> None:
    text = PAGE.read_text()
    named = set(re.findall(r"(?:model|parallel|tests)/[\w/]+\.py", text))
    there = {path.name for room in ("model", "parallel") for path in (ROOT / room / "kernels").glob("*.py")}
    assert len(named) >= 6 and not [name for name in sorted(named) if not (ROOT / name).exists()]
    assert set(re.findall(r"(?<![/\w])(\w+\.py)", text)) <= there
    for name in ("gather_matmul", "matmul_scatter", "sum_slots", "dispatch", "combine"):
        assert f"`{name}`" in text
