"""A dense model becomes one with experts that computes the same: sparse upcycling (arXiv 2212.05055).

    dense    y = down(silu(gate x) * up x), of width F
    cut      into ``split`` parts of F / split: their outputs add up to y     (fine-grained experts: arXiv 2410.07524)
    copied   expert  copy * split + part,  of experts / split copies
    router   a row drawn for each copy, the same for all of its parts, so that the top k are whole copies
    gates    of the chosen sum to one, each part's is 1 / split of its copy's: down is multiplied by ``split``

Gates and routers part the copies in training. Works on published tensors (model/huggingface_names.py), of any family
without experts, one at a time; what it writes is of the family with experts that has the rest of the model: qwen3_moe
where there are q/k norms, glm4_moe else, or DeepSeek-V3. Shapes: gate, up [F, H], down [H, F], router [experts, H].
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.build import allocate, draw
from model.config import ModelConfig, MoEConfig, ScoreFunction
from model.huggingface import Resident, open_published, refuse_full, write_folder
from model.huggingface_config import FILE, describe, read_config
from model.huggingface_names import Piece, cut, repeat
from model.shards import SHARD, Index, Pending, Shards
from model.upcycle_config import UpcycleConfig

EXPERT = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.((?:gate|up|down)_proj\.weight)")
ROUTER, BIAS = ".mlp.gate.weight", ".mlp.gate.e_score_correction_bias"


@torch.no_grad()
def upcycle(published: Path, folder: Path, wanted: UpcycleConfig, shard: int = SHARD) -> ModelConfig:
    """Writes the model in ``published`` with experts to ``folder``, in files of ``shard`` bytes. What it is now.

    Raises ValueError, before anything is written, where ``folder`` is not empty, or ``published`` cannot be read, has
    experts already or does not divide.
    """
    refuse_full(folder)
    dense = read_config(published)
    config = add_experts(dense, wanted)
    shapes = Resident(allocate(dense, torch.float32, "meta")).shapes()
    source, _ = open_published(dense, shapes, published)
    dtype = str(source.dtype("model.embed_tokens.weight")).removeprefix("torch.")
    values = describe(config, dtype, _read_eos(published))
    pieces = cut(config, Resident(allocate(config, torch.float32, "meta")).shapes())
    tensors = {piece.published: _plan(piece, source, config, wanted) for piece in pieces}
    tensors |= {copy: tensors[original] for copy, original in repeat(config).items()}
    write_folder(folder, values, tensors, shard)
    return config


def add_experts(dense: ModelConfig, wanted: UpcycleConfig) -> ModelConfig:
    """``dense`` with experts in its layers. Raises ValueError where that cannot be."""
    if dense.moe.experts:
        raise ValueError(f"it has {dense.moe.experts} experts already, and must be dense")
    if dense.ffn % wanted.split:
        raise ValueError(f"split={wanted.split} must divide the width of its feed-forward networks, {dense.ffn}")
    if wanted.dense_layers >= dense.num_layers:
        raise ValueError(f"dense_layers={wanted.dense_layers} must leave some of its {dense.num_layers} layers")
    softmax = dense.attention.qk_norm
    moe = MoEConfig(
        experts=wanted.experts,
        top_k=wanted.top_k,
        ffn=dense.ffn // wanted.split,
        score=ScoreFunction.softmax if softmax else ScoreFunction.sigmoid,
        bias_speed=0.0 if softmax else MoEConfig().bias_speed,
    )
    return replace(dense, name="upcycled", dense_layers=wanted.dense_layers, moe=moe)


def _plan(piece: Piece, source: Shards, config: ModelConfig, wanted: UpcycleConfig) -> Pending:
    """A published tensor still to be made: taken over, a part of a network, or new."""
    name = piece.published
    if name in source.entries:
        return Pending(source.dtype(name), source.entries[name].shape, lambda: source.read(name))
    if found := EXPERT.fullmatch(name):
        return _plan_part(source, found[1] + found[3], int(found[2]) % wanted.split, wanted.split)
    if name.endswith(BIAS):
        return Pending(torch.float32, (wanted.experts,), lambda: torch.zeros(wanted.experts))
    assert name.endswith(ROUTER), name
    return Pending(torch.float32, (wanted.experts, config.hidden), lambda: _draw_router(piece.ours, config, wanted))


def _plan_part(source: Shards, name: str, part: int, split: int) -> Pending:
    """A part of the weight ``name`` of a dense network: rows of gate and up, columns of down."""
    rows, columns = source.entries[name].shape
    down = name.endswith("down_proj.weight")
    width = (columns if down else rows) // split
    index: Index = (slice(None),) * down + (slice(part * width, (part + 1) * width),)
    shape = (rows, width) if down else (width, columns)
    return Pending(source.dtype(name), shape, lambda: source.read(name, index) * (split if down else 1))


def _draw_router(name: str, config: ModelConfig, wanted: UpcycleConfig) -> Tensor:
    """A row a copy, as often as the copy has parts: neighbours."""
    shape = (wanted.experts // wanted.split, config.hidden)
    rows = draw(name, shape, (slice(None), slice(None)), config.init_std, wanted.seed)
    return rows.repeat_interleave(wanted.split, dim=0)


def _read_eos(published: Path) -> int | None:
    """The token that ends a text, if it is one."""
    eos = json.loads((published / FILE).read_text()).get("eos_token_id")
    return eos if isinstance(eos, int) else None
