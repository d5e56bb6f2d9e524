"""DeepSeek-V3 and V2, and Kimi K2, which is a V3 with more experts in one group.

V2 (arXiv 2405.04434): softmax scores, gates that are not normalised, groups ranked by their best expert.
V3 (arXiv 2412.19437): sigmoid scores, selection biases, groups ranked by their two best, multi-token prediction.
"""

from dataclasses import replace

from model.config import AttentionKind, ModelConfig, ScoreFunction
from model.families.family import FIXED, ROUTERS, SIZES, Family, Field, Values

LATENT = (
    Field("attention.q_rank", "q_lora_rank", int, None),
    Field("attention.kv_rank", "kv_lora_rank", int),
    Field("attention.nope_dim", "qk_nope_head_dim", int),
    Field("attention.rope_dim", "qk_rope_head_dim", int),
    Field("attention.v_dim", "v_head_dim", int),
    Field("moe.aux_alpha", "aux_loss_alpha", float, 1e-4),
    Field("mtp.depth", "num_nextn_predict_layers", int, 0),
)
SAID = {"attention_bias": False, "moe_layer_freq": 1, "rope_interleave": True}
KEYS = FIXED | {"attention_bias": (False,), "moe_layer_freq": (1,)}


def _is_latent(config: ModelConfig) -> bool:
    return config.attention.kind is AttentionKind.mla


def _is_v2(config: ModelConfig) -> bool:
    return _is_latent(config) and config.moe.experts > 0 and config.moe.score is ScoreFunction.softmax


def _write(values: Values, config: ModelConfig) -> Values:
    values = values | {"num_key_value_heads": config.attention.heads}
    return values if config.moe.experts else values | {"first_k_dense_replace": config.num_layers}


def _read(values: Values) -> Values:
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads", heads) not in (heads, None):
        raise ValueError(f"num_key_value_heads={values['num_key_value_heads']} is not supported, only {heads}")
    return values


def _read_v2(values: Values) -> Values:
    return _read(values) | ({"n_group": 1, "topk_group": 1} if values.get("topk_method", "greedy") == "greedy" else {})


def _write_v2(values: Values, config: ModelConfig) -> Values:
    return _write(values, config) | {"topk_method": "greedy" if config.moe.groups == 1 else "group_limited_greedy"}


def _refuse_v2(config: ModelConfig) -> None:
    if config.moe.normalize_gates:
        raise ValueError("model.moe.normalize_gates=true cannot be published with model.moe.score=softmax")
    if config.mtp.depth:
        raise ValueError(f"model.mtp.depth={config.mtp.depth} cannot be published with model.moe.score=softmax")


def refuse_v3(config: ModelConfig) -> None:
    """What sigmoid routers with biases have no key for."""
    moe, where = config.moe, "cannot be published"
    if config.mtp.depth and moe.experts == 0:
        raise ValueError(
            f"model.mtp.depth={config.mtp.depth} {where} with model.moe.experts=0: its modules have experts"
        )
    if moe.experts and moe.experts // moe.groups < 2:
        raise ValueError(
            f"model.moe.groups={moe.groups} {where} with model.moe.experts={moe.experts}: a group has at least two"
        )


V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fits=_is_latent,
    fields=(*SIZES, *LATENT, *ROUTERS),
    fixed=KEYS | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    chosen={"moe.score": ScoreFunction.sigmoid},
    said=SAID | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    biased=True,
    read=_read,
    write=_write,
    refuse=refuse_v3,
)
KIMI = replace(V3, model_type="kimi_k2", fits=lambda config: False)  # to be read; written, it is a deepseek_v3
V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    fits=_is_v2,
    fields=(*SIZES, *LATENT, *ROUTERS),
    fixed=KEYS
    | {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
        "num_nextn_predict_layers": (0, None),
        "rope_interleave": (True,),
    },
    chosen={"moe.score": ScoreFunction.softmax, "moe.bias_speed": 0.0},
    said=SAID | {"scoring_func": "softmax"},
    read=_read_v2,
    write=_write_v2,
    refuse=_refuse_v2,
)
