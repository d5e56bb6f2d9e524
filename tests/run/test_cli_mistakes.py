"""Mistakes as a user makes them: each answered in a line or two with the key, the value, the rule, and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli

# What is typed, and what the answer has to contain besides it.
OVERRIDES = {
    # a key or a preset that is not there, with the nearest that is
    "model.num_layer=6": "did you mean model.num_layers?",
    "optimiser.lr=3e-4": "did you mean optimizer.lr?",
    "lr=3e-4": "did you mean optimizer.lr?",
    "steps=10": "did you mean run.steps or profile.steps?",
    "model.moe.expert=8": "did you mean model.moe.experts?",
    "modle=tiny": "did you mean model?",
    "+run.extra=1": "there is no key run.extra",
    "hydra.run.dir=out": "there is no key hydra.run.dir",
    "run=tinny": "did you mean tiny?",
    "run=5": "must be one of deepseek_v2_lite, deepseek_v3, small, tiny",
    "model=deepseek_v3_lite": "did you mean deepseek_v2_lite?",
    "run=null": "must be one of",
    # the wrong type
    "run.steps=many": "must be an integer",
    "run.steps=1.5": "must be an integer",
    "run.steps=1e3": "must be an integer; did you mean 1000?",
    "run.steps=": "must be an integer",
    "run.steps=null": "must be an integer",
    "run.steps=[1]": "must be an integer",
    "optimizer.lr=fast": "must be a number",
    "optimizer.lr=nan": "must be a finite number",
    "optimizer.clip=inf": "must be a finite number",
    "model.tied=maybe": "must be true or false",
    "run.name=null": "must be a string",
    "model.name=[a]": "must be a string",
    "precision=fp16": "must be one of bf16, fp8, mxfp8, fp32, fp64",
    "run.device=cudda": "must be one of auto, cpu, cuda, xpu; did you mean cuda?",
    "optimizer.rate.shape=cosin": "did you mean cosine?",
    "run.sinks=wandb": "did you mean [wandb]?",
    "run.sinks=[wand]": "each one of tensorboard, wandb",
    "data=stdlib": "must name one key of the section",
    "model.moe=8": "must name one key of the section",
    "model.moe={exprts: 4}": "did you mean model.moe.experts?",
    # a value outside its range, or at odds with another
    "model.num_layers=0": "must be positive",
    "model.attention.rope_dim=15": "must be even",
    "model.rope.factor=0.5": "must be at least 1",
    "model.dense_layers=9": "must lie in 0..model.num_layers=4",
    "model.moe.groups=3": "must divide model.moe.experts=8",
    "model.moe.top_groups=5": "must not exceed model.moe.groups=4",
    "model.moe.top_k=7": "must not exceed the 4 experts",
    "model.moe.aux_alpha=-1": "must not be negative",
    "model.mtp.depth=-1": "must not be negative",
    "model.vocab_size=200": "must be at least 264",
    "data.sequence_length=0": "must be at least 1",
    "data.held_out=1": "must lie between 0 and 1",
    "data.corpus=[]": "must name a text",
    "data.workers=0": "must be at least 1",
    "preflight.slow=1": "must be above 1",
    "telemetry.prometheus=9400": "must be host:port",
    "optimizer.lr=0": "must be positive",
    "optimizer.beta2=1": "must be at least 0 and below 1",
    "optimizer.rate.warmup_steps=-1": "must not be negative",
    "optimizer.rate.stable=0.5": "must be null with optimizer.rate.shape=cosine",
    "run.steps=-3": "must be positive",
    "checkpoint.folder=s3://": "must be a folder, or a URL such as s3://bucket/prefix (null: in the run's own)",
    "run.global_batch=0": "must be positive",
    "run.micro_batch=3": "must divide run.global_batch=8",
    "run.ramp.start=5": "must be a multiple of run.micro_batch=8",
    "run.threads=0": "must be positive",
    "run.id=a/b": "must be fit for a folder's name",
    "run.id=..": "must be fit for a folder's name",
    "run.seed=-1": "must not be negative",
    "run.sample.temperature=-1": "must not be negative",
    "parallel.pp=5": "model.num_layers=4 must be at least the number of pipeline stages, 5: lower parallel.pp",
    "parallel.pipeline.schedule=zbv": "did you mean zb_v?",
    "parallel.pipeline.schedule=dualpipe": "parallel.pp=1 must be even for parallel.pipeline.schedule=dualpipe",
    "parallel.pipeline.virtual=0": "must be at least 1",
    "parallel.pipeline.layers=4": "did you mean [4]?",
    "parallel.pipeline.layers=[3]": "together model.num_layers=4",
    "parallel.cp=2": "must be 1: there is no context parallelism yet",
    "parallel.ep=0": "must be at least 1",
    "parallel.dp=-1": "must be at least 1",
    "parallel.tp=3": "must divide model.attention.heads=4",
    "parallel.ep=3": "must divide model.moe.experts=8",
    "parallel.dp=3": "run.global_batch=8 must be divisible by parallel.dp=3",
    "parallel.engine=natif": "must be one of native, fsdp2, zero1, zero2, zero3; did you mean native?",
    "parallel.overlap.pieces=0": "must be at least 1",
    "parallel.overlap.multiprocessors=-1": "must not be negative",
    "parallel.overlap.tensor=split": "must be one of auto, joined, blocks, fused",
    "verify=never": "must be one of auto, require, skip",
    "cluster.price_per_device_hour=-1": "must not be negative",
    "cluster.devices_per_node=0": "must be at least 1",
    "cluster.nodes=2": "needs cluster=slurm: this machine is one node",
    "cluster.partition=fast": "needs cluster=slurm: no scheduler takes it on this machine",
    "cluster.requeue=false": "cluster.requeue=false needs cluster=slurm",
    "cluster.setup=[module]": "cluster.setup=[module] needs cluster=slurm",
    "cluster.device_gigabytes=0": "must be positive, or null",
    "cluster=slrum": "did you mean slurm?",
    "cluster.partion=fast": "did you mean cluster.partition?",
    "cluster.additional_parameters=3": "must be a mapping in braces, each value a string",
    "cluster.additional_parameters.nice=[1]": "must be a string: a value of cluster.additional_parameters",
    "cluster.additional_parameters={nice: [1]}": "must be a mapping in braces, each value a string",
    # words that cannot be read
    "run.steps=[1,2": "cannot be read",
    "run.id='a": "cannot be read",
    "run..steps=3": "is not a key",
    "run.steps=1,2": "add --multirun",
    "~run.steps": "cannot be deleted",
    "model@other=tiny": "have one place",
    "+run.steps=3": "write run.steps=3",
    "run.name=${nobody}": "cannot be resolved",
    "run.name=${oc.env:SHOESTRING_NOBODY}": "cannot be resolved",
}
# What is typed behind `validate cluster=slurm`, of 8 ranks where nothing else is said.
SLURM = {
    "parallel.dp=4": "parallel.pp*dp*cp*tp = 1*4*1*1 = 4 ranks must be cluster.nodes*devices_per_node = 1*8 = 8: there",
    "parallel.pp=3": "parallel.pp*cp*tp = 3*1*1 = 3 must divide cluster.nodes*devices_per_node = 1*8 = 8: there is",
    "cluster.nodes=3": "run.global_batch=8 must be divisible by parallel.dp=24",
    "cluster.nodes=0": "must be at least 1",
    "cluster.spares=-1": "must not be negative",
    "cluster.timeout_min=0": "must be at least 1, or null",
    "cluster.timeout_min=2": "cluster.signal_seconds=120 must be below the 120 seconds of cluster.timeout_min=2",
    "cluster.signal_seconds=0": "must be at least 1",
    "cluster.signal_seconds=70000": "must be at most 65535",
    "cluster.cpus_per_task=0": "must be at least 1, or null",
    "cluster.mem=lots": "must be a number with K, M, G or T behind it",
    "cluster.exclude=n1 n2": "must be names of nodes, as n1,n[3-5]",
    "cluster.partition=''": "must not be empty: null stands for nothing",
    "cluster.partition=' a'": "must not begin or end with a space",
    'cluster.qos="a\nb"': "must be printable characters on a single line",
    "cluster.account='a\x1bb'": "cluster.account=a\\x1bb must be printable",
    "cluster.container_mounts=['/a:/b']": "needs cluster.container_image: they are mounted in it",
    "cluster.launcher=mpirun": "must be one of srun, torchrun",
    "cluster.additional_parameters={nodes: 4}": "cluster.additional_parameters.nodes=4 must be left to cluster.nodes",
    "cluster.additional_parameters={ntasks_per_node: 4}": "must be left to cluster.devices_per_node",
    "cluster.additional_parameters={array: 0-3}": "must be left to --multirun",
    "cluster.additional_parameters={N: 4}": "must be named like a long option of sbatch",
    "cluster.additional_parameters={comment: ' a'}": "comment= a must not begin or end with a space",
    "cluster.device_gigabytes=0.001": "must be at least",
    "data.corpus=[nowhere]": "data.corpus=nowhere: no such file or folder",
    "data.tokenizer=nowhere": "data.tokenizer=nowhere: no such file",
    "init_from=nowhere": "init_from=nowhere must be a folder of weights",
    "run.folder=/dev/null/runs": "run.folder=/dev/null/runs must be a folder that takes files: /dev/null is no folder",
    "checkpoint.folder=s4://bucket/x": "Protocol not known: s4",
}
RAMP = ("run.ramp.start=4", "run.ramp.jump=1", "run.ramp.tokens=4096", "parallel.pp=2", "parallel.dp=1")
LINES = {
    ("trian",): ("trian", "did you mean train?"),
    ("--hlep",): ("--hlep", "not a verb"),
    ("params", "tiny"): ("tiny", "run=tiny"),
    ("params", "--multirum"): ("--multirum", "did you mean --multirun?"),
    ("params", "--cfg", "hydra"): ("--cfg=hydra", "must be job"),
    ("params", "--cfg"): ("--cfg=", "must be job"),
    ("params", "--config-dir", "nowhere"): ("--config-dir=nowhere", "must be a folder"),
    ("params", "-m", "run.id=a", "run.seed=1,2"): ("run.id=a", "names one run"),
    ("params", "-m", "run.seed=1,-2"): ("run.seed=-2", "must not be negative"),
    ("params", "-m", "run.seed=range(1"): ("run.seed=range(1", "cannot be read"),
    ("params", "=3"): ("=3", "there is no key"),
    ("params", "run.steps=a\nb\nc\nd"): ("run.steps=a", "cannot be read"),
    ("params", "parallel.dp=2", "parallel.ep=4"): ("parallel.ep=4", "must divide dp*cp*tp = 2*1*1 = 2"),
    ("params", "parallel.dp=4", "run.micro_batch=2", "run.ramp.start=2"): ("run.ramp makes a batch of 2", "dp=4"),
    ("params", "parallel.overlap.tensor=fused", "parallel.tp=2", "run.device=cpu"): ("tensor=fused", "run.device=cpu"),
    ("params", "parallel.pipeline.schedule=1f1b", "parallel.pipeline.virtual=2"): ("virtual=2", "which has 1 stages"),
    ("params", "parallel.overlap.multiprocessors=8", "run.device=cpu"): ("multiprocessors=8", "run.device=cpu"),
    ("params", "parallel.engine=zero1", "parallel.pipeline.schedule=zb_h1"): ("schedule=zb_h1", "weight gradients off"),
    ("params", "parallel.engine=fsdp2", "parallel.pipeline.schedule=interleaved_1f1b_overlap"): ("overlap", "pairs"),
    ("params", "parallel.engine=zero2", "parallel.pipeline.file=a.txt"): ("file=a.txt", "must be left out"),
    **{
        ("params", "parallel.engine=zero3", f"parallel.{axis}=2"): (
            f"parallel.{axis}=2",
            "zero3: DeepSpeed's ZeRO-3 knows",
        )
        for axis in ("pp", "tp", "ep", "cp")
    },
    ("params", "parallel.engine=zero3", "parallel.pipeline.schedule=gpipe"): ("schedule=gpipe", "must be 1f1b"),
    ("params", "parallel.engine=zero3", "parallel.pipeline.schedule=zb_h1"): ("schedule=zb_h1", "must be 1f1b"),
    ("params", "parallel.engine=zero3", "parallel.pipeline.file=a.txt"): ("file=a.txt", "must be left out"),
    ("params", "parallel.engine=zero3", "precision=fp64"): ("engine=zero3", "precision=fp64"),
    ("params", "parallel.engine=zero3", "precision=fp8"): ("engine=zero3", "precision=fp8"),
    ("params", "parallel.tp=2", "precision=fp8"): ("heads * (nope_dim + rope_dim) = 192", "96 is none"),
    ("params", "parallel.tp=2", "precision=mxfp8", "data.sequence_length=96"): ("sequence_length = 96", "64, 128"),
    ("params", "parallel.engine=zero3", "parallel.rebalance_every=2"): ("rebalance_every=2", "does not move experts"),
    (
        "params",
        "parallel.engine=fsdp2",
        "parallel.pp=1",
        "parallel.pipeline.schedule=interleaved_1f1b",
        "parallel.pipeline.virtual=2",
    ): ("virtual=2", "parallel.pp=1"),
    ("params", "parallel.pp=2", "parallel.pipeline.virtual=2", "parallel.pipeline.schedule=zb_v"): ("has 2 stages",),
    ("params", "parallel.pp=2", "parallel.pipeline.layers=[1,1,2]"): ("layers=[1,1,2]", "must be 2 numbers"),
    ("params", "parallel.pp=2", "parallel.pipeline.layers=[4,0]"): ("layers=[4,0]", "each at least 1"),
    ("params", "parallel.pp=3", "parallel.pipeline.schedule=zb_v"): ("pipeline stages, 6", "lower parallel.pp"),
    ("params", "parallel.pp=3", "parallel.pipeline.schedule=dualpipe"): ("parallel.pp=3", "must be even", "dualpipev"),
    ("params", "parallel.dp=1", "parallel.pp=2", "parallel.pipeline.schedule=dualpipev"): ("micro-batches=1", "= 4"),
    ("layout", "parallel.pp=2", "parallel.pipeline.schedule=dualpipev"): ("micro-batches=1", "lower run.micro_batch"),
    ("layout", "run.micro_batch=1", "run.ramp.start=2", "parallel.pp=2", "parallel.pipeline.schedule=dualpipev"): (
        "micro-batches=2",
        "so in step 0, whose batch is 2 by run.ramp",
    ),
    ("params", "run.micro_batch=1", *RAMP, "parallel.pipeline.schedule=dualpipe"): ("micro-batches=5", "in step 1, "),
    ("params", "run.compile=on", "parallel.pipeline.schedule=zb_h1"): ("run.compile=on", "zb_h1, which splits"),
    ("params", "parallel.rebalance_every=9", "parallel.pp=2", "parallel.pipeline.schedule=dualpipe"): (
        "every=9",
        "copies",
    ),
    ("params", "parallel.pipeline.file=mine.txt", "parallel.pipeline.virtual=2"): ("virtual=2", "must be left out"),
    ("completion",): ("completion needs <shell>", "--help"),
    ("completion", "bsh"): ("shell=bsh", "did you mean bash?"),
    ("completion", "bash", "a=1"): ("a=1", "takes no keys"),
}
# Files that a run cannot follow on two pipeline ranks, in 2 micro-batches.
SCHEDULES = {
    "0F0 0B0\n1F0 1B0": "is for 2 ranks and 1 micro-batches, the run has parallel.pp=2 and 2",
    "0F0 0F1 0B0 0B1": "is for 1 ranks and 2 micro-batches",
    "0F0 0F1\n1F0 1F1": "has no backward",
    "0F0 0F1 0B0\n1F0 1B0 1F1 1B1": "lacks its backward: 0B1",
    "0F0 0F1 0B0 0B1\n1F0 1B0 1X1": 'line 2, word 3 "1X1"',
    "0F0 0F1 0B0 0B1 0B1\n1F0 1B0 1F1 1B1": "is computed by rank 0",
    "2F0 2F1 2B0 2B1 0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1": "waits in a circle",
    "".join(f"{s}F0 {s}F1 " for s in range(5)) + "".join(f"{s}B0 {s}B1 " for s in range(4, -1, -1))
    + "\n5F0 5F1 5B0 5B1": "must be at least the number of pipeline stages, 6",
    "": "there is no action in it",
}  # fmt: skip
PRESETS = {
    "run: {steps: [1\n": "is not YAML",
    "run:\n\tsteps: 1\n": "is not YAML",
    "run: {name: a, name: b}\n": "duplicate key",
    "\0": "not YAML",
    "run: {steeps: 1}\n": "run.steeps: there is no such key; did you mean run.steps? (in run/mine.yaml)",
    "run: {steps: many}\n": "run.steps=many must be an integer (in run/mine.yaml)",
    "run: {device: cudda}\n": "did you mean cuda? (in run/mine.yaml)",
    "run: {name: null}\n": "run.name=null must be a string (in run/mine.yaml)",
    "run: null\n": "run=null must be a section",
    "run: 5\n": "5 stands where the keys of a section belong",
    "- 5\n": "must hold keys and values, not a list",
    "defaults:\n- override /model: nope\n": "model=nope must be one of",
    "defaults: [nope]\n": "run=nope must be one of",
    "defaults: nope\n": "defaults must be a list",
    "run: {name: '${nope}'}\n": "run.name=${nope} cannot be resolved",
    "run: {name: '${nope'}\n": "run.name",
    "run: {name: mine}\n": "data.sequence_length, optimizer.lr, run.global_batch, run.micro_batch, run.steps must have",
}


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints about a mistake, checked for the manners every such answer has."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("shoestring: ") and err.endswith("\n")
    assert 1 <= len(err.splitlines()) <= 2
    assert "Traceback" not in err and "omegaconf" not in err.lower() and "full_key" not in err
    return err


@pytest.mark.parametrize("word", OVERRIDES)
def test_override(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = answer(capsys, "params", word)
    key, _, value = word.lstrip("+~").partition("=")
    assert key.split("=")[0] in message
    assert value.strip("[]'") in message or value == "{exprts: 4}"
    assert OVERRIDES[word] in message


@pytest.mark.parametrize("word", SLURM)
def test_mistake_about_a_cluster(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = answer(capsys, "validate", "cluster=slurm", "run.micro_batch=1", word)
    assert SLURM[word] in message


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    message = answer(capsys, *words)
    assert all(part in message for part in LINES[words])


@pytest.mark.parametrize("verb", ["layout", "train"])
def test_schedule_file_that_is_not_there(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = answer(capsys, verb, "parallel.pp=2", "parallel.pipeline.file=nowhere.txt")
    assert "parallel.pipeline.file=nowhere.txt cannot be read as a schedule" in message


@pytest.mark.parametrize("text", SCHEDULES, ids=range(len(SCHEDULES)))
def test_schedule_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    message = answer(capsys, "layout", "parallel.pp=2", "run.micro_batch=4", f"parallel.pipeline.file={path}")
    assert SCHEDULES[text] in message
    assert f"parallel.pipeline.file={path}" in message or "model.num_layers=4" in message


@pytest.mark.parametrize(
    ("text", "word", "message"),
    [
        ("0F0 0F1 0B0 0B1\n1F0 1I0 1W0 1F1 1B1", "run.compile=on", "splits backwards"),
        ("0F0 1F0 1B0 0B0\n0F1 1F1 1B1 0B1", "parallel.rebalance_every=3", "that have copies do not move"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1", "run.ramp.start=4", "so in step 0, whose batch is 4 by run.ramp"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1", "parallel.engine=fsdp2", "only native runs schedules of your own"),
    ],
    ids=["compile", "rebalance", "ramp", "engine"],
)
def test_what_does_not_go_with_a_schedule_file(
    text: str, word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text(text)
    given = ("layout", "parallel.pp=2", "run.micro_batch=4", f"parallel.pipeline.file={tmp_path / 'mine.txt'}")
    assert cli.main(given) == 0 and capsys.readouterr().err == ""
    assert message in answer(capsys, *given, word)


@pytest.mark.parametrize("text", PRESETS, ids=range(len(PRESETS)))
def test_preset_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    assert PRESETS[text] in answer(capsys, "params", "--config-dir", str(tmp_path), "run=mine")


def test_preset_that_names_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.yaml").write_text("run: {steps: 1}\n")
    assert "# @package _global_" in answer(capsys, "params", f"--config-dir={tmp_path}", "run=mine")


def test_preset_that_hides_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tiny.yaml").write_text("")
    assert "rename yours" in answer(capsys, "params", "--config-dir", str(tmp_path))


@pytest.mark.parametrize("words", [["params", "model.num_layer=6"], ["train", "run.steps=-3"], ["trian"]])
def test_as_a_process(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.cli", *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert 1 <= len(run.stderr.splitlines()) <= 2
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    """A ValueError from a library, or any other exception, is not the user's to mend: exit code 1."""
    for fault in ("json.loads('{')", "1 / 0"):
        (tmp_path / "broken.py").write_text(f"import json\nSUMMARY = ''\ndef run(config, invocation):\n    {fault}\n")
        code = "import sys; from launcher import cli; cli.VERBS['broken'] = 'broken'; sys.exit(cli.main(['broken']))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert run.returncode == 1 and "Traceback" in run.stderr and "broken.py" in run.stderr
