"""All families. The first that fits a model is the one that it is published as."""

from model.config import ModelConfig
from model.families.deepseek import KIMI, V2, V3
from model.families.family import Family
from model.families.glm import GLM4
from model.families.llama import LLAMA
from model.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES = (V2, V3, KIMI, GLM4, QWEN3_MOE, QWEN3, QWEN2, LLAMA)
BY_TYPE = {family.model_type: family for family in FAMILIES}


def find(config: ModelConfig) -> Family:
    """What ``config`` would be published as."""
    return next(family for family in FAMILIES if family.fits(config))
