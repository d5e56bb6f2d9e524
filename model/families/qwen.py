"""Qwen3 (arXiv 2505.09388): grouped-query attention with q/k norm; dense, or softmax routers without shared experts.

And Qwen2, dense with biases, which the models distilled from DeepSeek-R1 are.
"""

from model.config import ModelConfig, ScoreFunction
from model.families.family import FIXED, Family, Field, Values, refuse_others
from model.families.grouped import GROUPED, is_grouped, read_heads, write_heads

KEYS = FIXED | {"use_sliding_window": (False,)}


def _read_moe(values: Values) -> Values:
    # What transformers calls it when it writes.
    return read_heads({"mlp_only_layers": [], "num_experts": values.get("num_local_experts")} | values)


def _write_moe(values: Values, config: ModelConfig) -> Values:
    dense = [layer for layer in range(config.num_layers) if not config.is_moe(layer)]
    return write_heads(values, config) | {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _refuse_moe(config: ModelConfig) -> None:
    wanted = {"attention__qk_norm": True, "attention__bias": False, "attention__nope_dim": 0, "mtp__depth": 0}
    refuse_others(config, "qwen3_moe", **wanted, moe__shared_experts=0, moe__groups=1, moe__gate_scale=1.0)


def _refuse_dense(config: ModelConfig) -> None:
    refuse_others(config, "qwen3", attention__bias=False, attention__nope_dim=0, mtp__depth=0)


def _refuse_qwen2(config: ModelConfig) -> None:
    refuse_others(config, "qwen2", attention__qk_norm=False, attention__nope_dim=0, mtp__depth=0)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fits=lambda config: is_grouped(config) and config.moe.experts > 0 and config.moe.score is ScoreFunction.softmax,
    fields=(
        *GROUPED,
        Field("moe.experts", "num_experts", int),
        Field("moe.top_k", "num_experts_per_tok", int),
        Field("moe.ffn", "moe_intermediate_size", int),
        Field("moe.normalize_gates", "norm_topk_prob", bool, False),
        Field("moe.aux_alpha", "router_aux_loss_coef", float, 1e-3),
        Field("moe.every", "decoder_sparse_step", int, 1),
        Field("moe.skip", "mlp_only_layers", list, []),
    ),
    fixed=KEYS | {"attention_bias": (False,)},
    chosen={
        "moe.score": ScoreFunction.softmax,
        "moe.bias_speed": 0.0,
        "attention.qk_norm": True,
        "dense_layers": 0,
    },
    said={"attention_bias": False},
    read=_read_moe,
    write=_write_moe,
    refuse=_refuse_moe,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fits=lambda config: is_grouped(config) and config.moe.experts == 0 and config.attention.qk_norm,
    fields=GROUPED,
    fixed=KEYS | {"attention_bias": (False,)},
    chosen={"attention.qk_norm": True},
    said={"attention_bias": False},
    read=read_heads,
    write=write_heads,
    refuse=_refuse_dense,
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fits=lambda config: is_grouped(config) and config.moe.experts == 0 and config.attention.bias,
    fields=GROUPED,
    fixed=KEYS,
    chosen={"attention.bias": True},
    read=read_heads,
    write=write_heads,
    refuse=_refuse_qwen2,
)
