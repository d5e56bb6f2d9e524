"""What may be imported where: rooms one way, configuration the standard library only, heavy libraries only where used.

``make check`` holds the order of the rooms with import-linter; this file holds what a graph of modules cannot say.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("configs", "launcher", "model", "parallel", "planner", "training")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
# Loaded inside the function that needs them: they cost seconds, or are not there.
LAZY = {
    "deepspeed",
    "fsspec",
    "mpi4py",
    "transformers",
    "triton",
    "wandb",
    "tensorboard",
    "pynvml",
    "pyarrow",
    "zstandard",
}
PURE = {
    "configs", "model.config", "model.count", "model.families", "model.upcycle_config", "parallel.config",
    "parallel.pipeline.action", "parallel.pipeline.schedules", "parallel.pipeline.stages", "parallel.placement",
    "parallel.rules", "parallel.topology", "training.config", "training.data.config", "training.footprint",
    "training.health.config", "training.ramp", "training.support", "training.timeline",
}  # fmt: skip
# Data and rules about ranks: the standard library, numpy where it pays.
PLAIN = (
    "topology",
    "placement",
    "balance",
    "pipeline/action",
    "pipeline/draw",
    "pipeline/lower",
    "pipeline/prove",
    "pipeline/schedules",
    "pipeline/simulate",
    "pipeline/table",
    "pipeline/text",
    "pipeline/trace",
    "pipeline/validate",
)


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Names of the modules that a file imports; with ``top_level``, only what runs when it is imported itself."""
    tree = ast.parse(path.read_text())
    inner = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if top_level and id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their room"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def loaded(statement: str) -> set[str]:
    """Top-level modules in memory after ``statement`` ran in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stderr.split())


def test_schema_loads_the_standard_library_only() -> None:
    ours = {"configs", "model", "parallel", "training"}
    assert not loaded("import configs.schema") - ours - sys.stdlib_module_names - loaded("")


HEAVY = {"torch", "numpy", "transformers", "deepspeed", "mpi4py", "triton"}


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "--help"], ["completion", "bash"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    assert not loaded(f"from launcher import cli; assert cli.main({words}) == 0") & HEAVY


@pytest.mark.parametrize("word", ["model.layers=6", "run.steps=-1", "run=tinny"])
def test_a_configuration_error_loads_no_torch(word: str) -> None:
    modules = loaded(
        f"from launcher import cli; import io; sys.stderr = io.StringIO(); code = cli.main(['train', '{word}'])"
        "; sys.stderr = sys.__stderr__; assert code == 2"
    )
    assert "hydra" in modules and not modules & HEAVY


@pytest.mark.parametrize("line", ["shoestring ", "shoestring train model.", "shoestring generate "])
def test_help_and_completion_load_no_hydra(line: str) -> None:
    statement = f"import os; os.environ['SHOESTRING_LINE'] = {line!r}\nfrom launcher import cli\n"
    modules = loaded(statement + "assert cli.main(['completion', 'words']) == cli.main(['--help']) == 0")
    assert not modules & (HEAVY | {"hydra", "omegaconf", "yaml", "rich"})


def test_configuration_imports_the_standard_library_only() -> None:
    pure = [path for path in FILES if name(path) in PURE or name(path).startswith("configs.")]
    assert len(pure) >= 5
    for path in pure:
        for module in imports(path):
            known = module.partition(".")[0] in sys.stdlib_module_names or module.startswith(tuple(PURE))
            assert known, f"{name(path)} imports {module}"


def test_parallel_rules_are_plain() -> None:
    for stem in PLAIN:
        path = ROOT / "parallel" / f"{stem}.py"
        for module in imports(path) if path.exists() else ():
            top = module.partition(".")[0]
            assert top in sys.stdlib_module_names or top in ("numpy", "parallel"), f"{name(path)} imports {module}"


def test_heavy_libraries_are_imported_where_used() -> None:
    for path in FILES:
        kernels = name(path).startswith(("model.kernels.", "parallel.kernels."))
        lazy = LAZY - {"triton"} if kernels else LAZY
        for module in imports(path, top_level=True):
            assert module.partition(".")[0] not in lazy, f"{name(path)} imports {module} at its top"
            assert not module.startswith("torch.utils.tensorboard"), name(path)


def test_the_launcher_loads_torch_where_used() -> None:
    """And numpy: the files that draw a page have it at their top, and are loaded where one is drawn."""
    for path in FILES:
        if name(path).startswith("launcher."):
            modules = set(imports(path, top_level=True))
            drawn = name(path).startswith("launcher.page.") and name(path) != "launcher.page.command"
            heavy = (HEAVY - {"numpy"} if drawn else HEAVY) & {module.partition(".")[0] for module in modules}
            assert not heavy, f"{name(path)} imports {heavy} at its top"
            assert drawn or not any(module.startswith("launcher.page") for module in modules), name(path)


def test_few_files_know_how_a_configuration_is_written() -> None:
    """Hydra where words are read, OmegaConf beside it where every rank reads what was kept of them."""

    def who(library: str) -> set[str]:
        return {name(path) for path in FILES if library in {each.partition(".")[0] for each in imports(path)}}

    assert who("hydra") == {"launcher.compose", "launcher.words"}
    assert who("omegaconf") == {"launcher.explain", "launcher.tree", "launcher.words"}


def test_the_model_knows_no_ranks() -> None:
    for path in FILES:
        if name(path).startswith("model."):
            assert not [module for module in imports(path) if module.startswith("torch.distributed")], name(path)
