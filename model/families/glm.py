"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's routers and prediction modules over grouped-query attention with biases.

Half of each head is rotated; q/k norm in the large model only.
"""

from model.config import ModelConfig, ScoreFunction
from model.families.deepseek import refuse_v3
from model.families.family import FIXED, ROUTERS, Family, Field, Values
from model.families.grouped import GROUPED, is_grouped, read_heads, write_heads


def _fits(config: ModelConfig) -> bool:
    return is_grouped(config) and config.moe.experts > 0 and config.moe.score is ScoreFunction.sigmoid


def _write(values: Values, config: ModelConfig) -> Values:
    a = config.attention
    return write_heads(values, config) | {"partial_rotary_factor": a.rope_dim / a.width}


GLM4 = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    fits=_fits,
    fields=(
        *GROUPED,
        *ROUTERS,
        Field("attention.qk_norm", "use_qk_norm", bool, False),
        Field("attention.bias", "attention_bias", bool, False),
        Field("mtp.depth", "num_nextn_predict_layers", int, 0),
    ),
    fixed=FIXED,
    chosen={"moe.score": ScoreFunction.sigmoid},
    biased=True,
    read=lambda values: read_heads(values, 0.5),
    write=_write,
    refuse=refuse_v3,
)
