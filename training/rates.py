"""The learning rate of a step, as a pure function of the configuration and the batch schedule.

Every shape opens with a linear warm-up: step k of its ``warmup_steps`` has lr * (k + 1) / warmup_steps.
Phases are shares of the run's sequences, so that a batch-size ramp moves none of them.

    constant   lr
    cosine     from lr after the warm-up to final * lr at the end, half a cosine
    wsd        lr for the share ``stable`` (arXiv 2404.06395), then to final * lr by 1 - sqrt (2405.18392)
    deepseek   lr | half a cosine to final * lr | final * lr | the last 1%     (DeepSeek-V3, section 4.2)
               10 T     4.3 T                     333 B        167 B             tokens
               2.2e-4   to 2.2e-5                 2.2e-5       7.3e-6            published rates
"""

import math

from training.config import OptimizerConfig, RateShape
from training.ramp import BatchSchedule

DEEPSEEK_PHASES = (10e12, 4.3e12, 333e9, 167e9)  # tokens: constant, cosine, constant, last
DEEPSEEK_LAST = 7.3e-6 / 2.2e-5  # the last rate as a share of the one before


def rate(config: OptimizerConfig, step: int, steps: int, batches: BatchSchedule) -> float:
    """The learning rate of ``step`` (from 0) in a run of ``steps``."""
    warmup, shape, final = config.rate.warmup_steps, config.rate.shape, config.rate.final
    if step < warmup:
        return config.lr * (step + 1) / warmup
    total, done, warm = batches.before(steps), batches.before(step), batches.before(warmup)
    share = done / total
    if shape is RateShape.constant:
        factor = 1.0
    elif shape is RateShape.cosine:
        factor = _cosine((done - warm) / (total - warm), final)
    elif shape is RateShape.wsd:
        stable = config.rate.stable or 0.0
        decayed = (share - stable) / (1 - stable)
        factor = 1 - (1 - final) * math.sqrt(max(0.0, decayed))
    else:
        factor = _deepseek(share, final)
    return config.lr * factor


def _deepseek(share: float, final: float) -> float:
    constant, cosine, _, last = (tokens / sum(DEEPSEEK_PHASES) for tokens in DEEPSEEK_PHASES)
    if share >= 1 - last:
        return final * DEEPSEEK_LAST
    return _cosine(min(1.0, max(0.0, share - constant) / cosine), final)


def _cosine(share: float, final: float) -> float:
    """Half a cosine from 1 at ``share`` 0 to ``final`` at 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
