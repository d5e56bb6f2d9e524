"""Every kernel compiles ahead of time for three targets, without a device; what comes out is read."""

import importlib.metadata
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
TARGETS = ("cuda:90", "cuda:100", "hip:gfx942")
PRODUCTS = ("gather_matmul", "matmul_scatter")
UNITS = {"cuda:90": "wgmma.mma_async", "cuda:100": "tcgen05.mma", "hip:gfx942": "v_mfma_f32"}
WAIT = ("gather_matmul", "sum_slots", "combine", "await_flags")
RAISE = ("matmul_scatter", "dispatch", "announce", "mark")
COMPILE = """
import pickle, sys
from parallel.kernels.compile import compile_kernels, table
made = [c for target in sys.argv[1:] for c in compile_kernels(target)]
sys.stdout.buffer.write(pickle.dumps(([tuple(c) for c in made], table(made))))
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str]:
    """All kernels for all targets and their table, from a process that does nothing else."""
    cache = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE, *TARGETS],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"},
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr.decode()
    made, table = pickle.loads(run.stdout)  # noqa: S301 (written above)
    return made, table


@pytest.fixture(scope="module")
def compiled(output: tuple[list[Any], str]) -> dict[tuple[str, str], Any]:
    """From (kernel, target) to registers, spills, shared bytes, text and binary."""
    return {(kernel, target): rest for kernel, target, *rest in output[0]}


def test_every_kernel_compiles_for_every_target(compiled: dict[tuple[str, str], Any]) -> None:
    assert {target for _, target in compiled} == set(TARGETS)
    assert {kernel for kernel, _ in compiled} == {*WAIT, *RAISE}
    assert len(compiled) == len(TARGETS) * len({*WAIT, *RAISE})
    texts = [path.read_text() for path in (ROOT / "parallel" / "kernels").glob("*.py")]
    jitted = [name for text in texts for name in re.findall(r"@triton\.jit.*\ndef (_\w+)\(", text)]
    assert len(jitted) == len({*WAIT, *RAISE}), "a kernel that nothing compiles"


def test_binaries_are_for_their_targets(compiled: dict[tuple[str, str], Any]) -> None:
    for (kernel, target), (registers, spills, shared, _, binary) in compiled.items():
        assert binary[:4] == b"\x7fELF" and registers > 0, (kernel, target)
        assert spills == 0, f"{kernel} spills on {target}"
        assert shared <= (65536 if target.startswith("hip") else 232448), (kernel, target)


@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.parametrize("target", TARGETS)
def test_products_use_the_matrix_units(compiled: dict[tuple[str, str], Any], kernel: str, target: str) -> None:
    text = compiled[kernel, target][3]
    assert UNITS[target] in text
    # The accelerator's loads would need more than these flags to be ordered behind a peer's stores.
    assert "cp.async.bulk" not in text and "tensor.1d" not in text


@pytest.mark.parametrize("kernel", WAIT)
def test_waits_acquire_from_the_system(compiled: dict[tuple[str, str], Any], kernel: str) -> None:
    for target in TARGETS[:2]:
        text = compiled[kernel, target][3]
        poll = text.index("ld.relaxed.sys.global.b32")
        fence = text.index("fence.acquire.sys;", poll)
        assert re.match(r"fence\.acquire\.sys;\s+bar\.sync", text[fence:]) or kernel == "await_flags"
        assert "ld.global.nc" not in text
        if kernel == "gather_matmul":
            assert text.index("cp.async.cg") > fence, "no load of a tile before its flag"
    asm = compiled[kernel, "hip:gfx942"][3]
    assert re.search(r"global_load_dword v\d+, .* sc0 sc1\n", asm) and "buffer_inv sc0 sc1" in asm


@pytest.mark.parametrize("kernel", RAISE)
def test_flags_are_raised_behind_the_stores_of_the_whole_program(
    compiled: dict[tuple[str, str], Any], kernel: str
) -> None:
    for target in TARGETS[:2]:
        text = compiled[kernel, target][3]
        (flag,) = (match.start() for match in re.finditer(r"red\.global\.sys\.release\.add\.u32", text))
        if kernel in ("matmul_scatter", "dispatch"):
            # Stores of the loop before, which may come later in the text, or of this stretch without a jump.
            stretch = re.split(r"\$L__BB\S+:|st\.global", text[:flag])[-1]
            assert "bar.sync" in stretch, (kernel, target)
            assert "st.global.v4.b32" in text, "rows leave 16 bytes at a time"
    asm = compiled[kernel, "hip:gfx942"][3]
    assert re.search(r"buffer_wbl2 sc0 sc1\n(?:.*\n)*?\s*s_waitcnt vmcnt\(0\)\n\s*global_atomic_add .* sc1\n", asm)


def test_the_page_shows_what_is_printed(output: tuple[list[Any], str]) -> None:
    """Its kernels and targets in any case, its figures where Triton is the version that it names."""
    version, shown = re.search(r"^    Triton (\S+)\n((?:    .*\n)+)", PAGE.read_text(), re.MULTILINE).groups()  # type: ignore[union-attr]
    shown, printed = textwrap.dedent(shown).strip(), output[1]
    assert [line.split()[:2] for line in shown.splitlines()] == [line.split()[:2] for line in printed.splitlines()]
    assert shown == printed or version != importlib.metadata.version("triton")


def test_files_that_the_page_names_exist() -> None:
    text = PAGE.read_text()
    named = set(re.findall(r"(?:parallel|tests)/[\w/]+\.py", text))
    named |= {f"parallel/kernels/{name}" for name in re.findall(r"(?<![/\w])(\w+\.py)", text)}
    assert len(named) >= 6 and not [name for name in sorted(named) if not (ROOT / name).exists()]
    for name in ("gather_matmul", "matmul_scatter", "sum_slots", "dispatch", "combine"):
        assert f"`{name}`" in text
