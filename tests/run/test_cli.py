"""The command itself: help, version, printing the configuration, sweeps, presets of one's own, run folders."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from configs.schema import RunConfig
from launcher import cli, folder, keys
from launcher.compose import Composer
from launcher.invocation import Invocation
from launcher.tree import load


def lines(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_help_names_verbs_presets_flags(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(lines(capsys, "--help"))
    assert all(re.search(rf"^  {verb} +\w", text, re.MULTILINE) for verb in cli.VERBS)
    assert re.search(r"run= +deepseek_v2_lite \| deepseek_v3 \| small \| tiny", text)
    assert all(flag in text for flag in cli.FLAGS)
    assert text == "\n".join(lines(capsys))


def test_help_of_a_verb_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    text = lines(capsys, "train", "--help")
    listed = {line.split("=")[0].strip() for line in text if line.startswith("  ") and "=" in line}
    assert set(keys.table(RunConfig)) <= listed
    assert any(
        re.fullmatch(r"  run.threads=null +an integer or null; per rank; null: an equal share of the cores", line)
        for line in text
    )
    assert any("run.sinks=[]" in line and "tensorboard, wandb" in line for line in text)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, summary, *_ = lines(capsys, *verb.split(), "-h")
    assert first.startswith(f"usage: shoestring {verb}") and len(summary) > 10


def test_examples_compose(capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that help shows are ones that work."""
    from launcher.help import EXAMPLES

    for example in EXAMPLES:
        _, verb, *words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", example))
        assert lines(capsys, verb, *words, *(["--cfg", "job"] if verb != "completion" else []))


def test_a_verb_is_a_module_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.params", "run=small"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "13.62 M" in run.stdout and run.stderr == ""


def test_a_reader_may_leave(tmp_path: Path) -> None:
    """``shoestring params | head -1`` ends quietly."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        command = [sys.executable, "-m", "launcher.params"]
        run = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (141, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, "--version")
    assert re.fullmatch(r"shoestring \d+\.\d+\.\d+", line)


def test_cfg_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run=small", "model.num_layers=6", "optimizer.lr=3e-4", "run.sinks=[wandb]", "run.name=${model.name}_6")
    tree = yaml.safe_load("\n".join(lines(capsys, "train", *words, "--cfg", "job")))
    assert tree["model"]["num_layers"] == 6 and tree["model"]["hidden"] == 256
    assert tree["optimizer"]["lr"] == 3e-4
    assert tree["run"]["sinks"] == ["wandb"] and tree["run"]["name"] == "small_6"


def test_multirun_runs_the_product_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("optimizer.lr=1e-3,3e-3", "run.seed=range(1,4)", "model=glob(deep*)", "--multirun")
    heads = [line for line in lines(capsys, "params", *words) if line.startswith("# job")]
    assert len(heads) == 12
    assert heads[0] == "# job 1 of 12: optimizer.lr=0.001 run.seed=1 model=deepseek_v2_lite"
    assert heads[1] == "# job 2 of 12: optimizer.lr=0.001 run.seed=1 model=deepseek_v3"
    assert heads[-1] == "# job 12 of 12: optimizer.lr=0.003 run.seed=3 model=deepseek_v3"


def test_multirun_stops_at_the_first_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text(
        "SUMMARY, seeds = '', []\n"
        "def run(config, invocation):\n    seeds.append(config.run.seed)\n    return config.run.seed - 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "failing", "failing")
    assert cli.main(["failing", "-m", "run.seed=1,4,5"]) == 3
    assert sys.modules.pop("failing").seeds == [1, 4]


@pytest.mark.parametrize("name", ["mine", "my presets, v=1", "it's"])
def test_presets_of_ones_own(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / name
    for group, text in {
        "run/mine": "# @package _global_\ndefaults: [override /model: wide]\n"
        "run: {name: mine, steps: 7, global_batch: 2, micro_batch: 1}\n",
        "model/wide": "defaults: [tiny]\nname: wide\nhidden: 512\n",
        "extra/long": "# @package _global_\ndata: {sequence_length: 64}\n",
    }.items():
        (own / group).parent.mkdir(parents=True, exist_ok=True)
        (own / f"{group}.yaml").write_text(text)
    words = ("run=mine", "+extra=long", "optimizer.lr=1e-3", f"run.folder={tmp_path}")
    tree = yaml.safe_load("\n".join(lines(capsys, "train", "--cfg=job", f"--config-dir={own}", *words)))
    assert (tree["run"]["steps"], tree["model"]["hidden"], tree["model"]["num_layers"]) == (7, 512, 4)
    assert tree["data"]["sequence_length"] == 64


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra makes no folder, changes no directory and sets up no logging."""
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    Composer().compose(("run=small",))
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())
    assert logging.getLogger().handlers == handlers


def start(*overrides: str) -> tuple[RunConfig, Invocation]:
    config, text = Composer().compose(overrides)
    return config, Invocation("train", (), overrides, text)


def test_run_folder_says_what_ran(tmp_path: Path) -> None:
    overrides = (f"run.folder={tmp_path}", "run.name=try", "run.sample.prompt='a \"b\" c'", "data.corpus=[x,y]")
    config, invocation = start(*overrides)
    path = folder.create(config, invocation)
    assert re.fullmatch(r"try-\d{8}-\d{6}", path.name) and path.parent == tmp_path
    assert folder.load_config(path) == config
    assert shlex.split((path / "command.txt").read_text()) == ["shoestring", "train", *overrides]
    versions = json.loads((path / "versions.json").read_text())
    assert versions["python"] == sys.version.split()[0]
    assert versions["packages"]["torch"] and versions["platform"]
    git = versions["git"]
    assert git is None or (re.fullmatch(r"[0-9a-f]{40}", git["revision"]) and git["dirty"] in (True, False))


def test_command_line_leads_to_the_same_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder.create(*start(f"run.folder={tmp_path}", "run=small", "run.name=again"))
    words = shlex.split((path / "command.txt").read_text())
    printed = "\n".join(lines(capsys, *words[1:], "--cfg", "job"))
    assert yaml.safe_load(printed) == yaml.safe_load((path / "config.yaml").read_text())


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    config, invocation = start(f"run.folder={tmp_path}")
    assert len({folder.create(config, invocation) for _ in range(5)}) == 5


def test_a_taken_id_is_refused(tmp_path: Path) -> None:
    config, invocation = start(f"run.folder={tmp_path}", "run.id=mine")
    assert folder.create(config, invocation) == tmp_path / "mine"
    with pytest.raises(ValueError, match=r"run\.id=mine is taken"):
        folder.create(config, invocation)


def test_a_run_is_found_by_id_and_by_path(tmp_path: Path) -> None:
    config, invocation = start(f"run.folder={tmp_path}", "run.id=mine")
    path = folder.create(config, invocation)
    assert folder.open("mine", str(tmp_path)).path == path == folder.open(str(path)).path
    with pytest.raises(ValueError, match=r"run=mien must be .* did you mean mine\?"):
        folder.open("mien", str(tmp_path))


@pytest.mark.parametrize("preset", keys.groups(keys.PRESETS)["run"])
def test_configuration_survives_its_file(preset: str, tmp_path: Path) -> None:
    config, text = Composer().compose((f"run={preset}", "run.sinks=[tensorboard]", "data.corpus=['a b',c]"))
    (tmp_path / "config.yaml").write_text(text)
    assert load(tmp_path / "config.yaml") == config
    assert load(tmp_path / "config.yaml") != replace(config, init_from="elsewhere")


def test_an_unreadable_configuration_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {steps: many}\n")
    with pytest.raises(ValueError, match=r"run\.steps=many must be an integer"):
        load(tmp_path / "config.yaml")


COMPLETIONS = {
    "shoestring tr": ["train"],
    "shoestring train run": ["run=", "run."],
    "shoestring train run=": ["deepseek_v2_lite", "deepseek_v3", "small", "tiny"],
    "shoestring train model=deepseek_v3 model.m": ["model.moe.", "model.mtp."],
    "shoestring train model.rope.t": ["model.rope.theta="],
    "shoestring train precision=": ["bf16", "fp8", "mxfp8", "fp32", "fp64"],
    "shoestring train run.sinks=": ["[tensorboard]", "[wandb]"],
    "shoestring train model.tied=t": ["true"],
    "shoestring train --mu": ["--multirun"],
    "shoestring completion ": ["bash", "zsh", "fish"],
    "shoestring generate ti": ["tiny-1"],
    "shoestring nowhere ": [],
}
ASK = """
eval "$(shoestring completion bash)"
for COMP_LINE in "$@"; do
    COMP_POINT=${#COMP_LINE}
    _shoestring
    echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes(tmp_path: Path) -> None:
    """Asked as bash does it, through the script that users load."""
    (tmp_path / "runs" / "tiny-1").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-1" / "config.yaml").touch()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-c", ASK, "bash", *COMPLETIONS]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert [line.split() for line in run.stdout.splitlines()] == list(COMPLETIONS.values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(lines(capsys, "completion", shell))
    assert "SHOESTRING_LINE=" in text and "shoestring completion words" in text
