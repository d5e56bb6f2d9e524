"""Llama 3 (arXiv 2407.21783): dense, grouped-query attention without norms or biases; its own stretching of RoPE."""

from model.config import ModelConfig
from model.families.family import FIXED, Family, refuse_others
from model.families.grouped import GROUPED, is_grouped, read_heads, write_heads


def _refuse(config: ModelConfig) -> None:
    refuse_others(config, "llama", attention__nope_dim=0, mtp__depth=0)
    if config.hidden % config.attention.heads:
        raise ValueError(
            f"model.hidden={config.hidden} cannot be published as llama with model.attention.heads="
            f"{config.attention.heads}: transformers wants a multiple"
        )


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fits=lambda config: is_grouped(config) and config.moe.experts == 0,
    fields=GROUPED,
    fixed=FIXED | {"attention_bias": (False,), "pretraining_tp": (1,)},
    said={"attention_bias": False, "mlp_bias": False},
    read=read_heads,
    write=write_heads,
    refuse=_refuse,
)
