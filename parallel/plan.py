"""Where every parameter of our transformer lies: the table that ``parallelize`` follows.

rows        over tp   outputs of q_b, kv_b, qkv (whole heads), embedding, head (vocabulary; parts may differ by a row)
widths      over tp   inputs of o and down, the width of fused gate and up (parts may differ by one)
experts     over ep   whole experts, never split by tp
replicated            what works on sequence shards: norms, routers, latent projections, MTP's projection
"""

from model.config import AttentionKind, ModelConfig
from parallel.placement import REPLICATED, Placement, Plan, Row
from parallel.topology import Axis

ROWS = Placement(Axis.tp, 0)  # outputs: heads, vocabulary
WIDTHS = Placement(Axis.tp, 1)  # inputs [outputs, inputs], or the width of a fused weight [2, width, inputs]
EXPERTS = Placement(Axis.ep, 0)


def plan_transformer(config: ModelConfig) -> Plan:
    """The table. The first row that matches a name counts; a row is there only if the model has such a parameter."""
    a = config.attention
    latent, grouped, compressed = a.kind is AttentionKind.mla, a.kind is AttentionKind.gqa, a.q_rank is not None
    blocks = [*range(config.num_layers), *range(config.num_layers, config.num_layers + config.mtp.depth)]
    routed = any(map(config.is_moe, blocks))
    dense = not all(map(config.is_moe, blocks)) or config.moe.shared_experts > 0
    table = (
        (True, "embedding.weight", ROWS),
        (not config.tied, "head.weight", ROWS),
        (compressed, "*.mla.q_b.weight", ROWS),
        (latent and not compressed, "*.mla.q.weight", ROWS),
        (latent, "*.mla.kv_b.weight", ROWS),
        (latent, "*.mla.o.weight", WIDTHS),
        (grouped, "*.gqa.qkv.weight", ROWS),
        (a.bias, "*.gqa.bias", ROWS),
        (grouped, "*.gqa.o.weight", WIDTHS),
        (routed, "*.routed.*.weight", EXPERTS),
        (dense, "*.gate_up.weight", WIDTHS),
        (dense, "*.down.weight", WIDTHS),
        (routed, "*.router.weight", REPLICATED),
        (latent, "*.mla.*kv_a.weight", REPLICATED),
        (True, "*norm.weight", REPLICATED),
        (config.mtp.depth > 0, "mtp.*.project.weight", REPLICATED),
    )
    return tuple(Row(pattern, placement) for there, pattern, placement in table if there)
