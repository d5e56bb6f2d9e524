"""The composed configuration: shipped presets against what was published, and the rules all of its dataclasses keep."""

from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any

import pytest

from configs.schema import RunConfig
from launcher import keys
from launcher.compose import Composer
from launcher.words import compose_plain
from model.config import ScoreFunction
from training.config import MomentDtype, Precision, RateShape, SamplingConfig
from training.ramp import schedule_batches
from training.rates import rate

COMPOSER = Composer()
PRESETS = keys.groups(keys.PRESETS)


def compose(*overrides: str) -> RunConfig:
    return COMPOSER.compose(overrides)[0]


@pytest.mark.parametrize("run", PRESETS["run"])
@pytest.mark.parametrize("model", PRESETS["model"])
def test_every_pair_of_presets_composes(run: str, model: str) -> None:
    config = compose(f"run={run}", f"model={model}")
    assert (config.run.name, config.model.name) == (run, model)


@pytest.mark.parametrize("run", PRESETS["run"])
def test_a_run_preset_chooses_its_model(run: str) -> None:
    assert compose(f"run={run}").model.name == run


def test_nothing_said_means_tiny() -> None:
    config = compose()
    assert config == compose("run=tiny")
    assert (config.data.sequence_length, config.precision) == (256, Precision.bf16)


def test_overrides_win_in_the_order_typed() -> None:
    config = compose("run.steps=5", "run.steps=7", "++model.num_layers=6", "optimizer={lr: 1e-3, beta1: 0.8}")
    assert (config.run.steps, config.model.num_layers) == (7, 6)
    assert (config.optimizer.lr, config.optimizer.beta1, config.optimizer.beta2) == (1e-3, 0.8, 0.95)


# The released config.json of each model, in its own names.
PUBLISHED = {
    "deepseek_v3": {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "first_k_dense_replace": 3, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6,
        "rope_theta": 10000, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
    },
    "deepseek_v2_lite": {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
        "first_k_dense_replace": 1, "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6,
        "rope_theta": 10000, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip
PLACES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden", "intermediate_size": "ffn", "num_hidden_layers": "num_layers",
    "first_k_dense_replace": "dense_layers", "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tied",
    "num_attention_heads": "attention.heads", "q_lora_rank": "attention.q_rank", "kv_lora_rank": "attention.kv_rank",
    "qk_nope_head_dim": "attention.nope_dim", "qk_rope_head_dim": "attention.rope_dim", "v_head_dim": "attention.v_dim",
    "n_routed_experts": "moe.experts", "num_experts_per_tok": "moe.top_k", "moe_intermediate_size": "moe.ffn",
    "n_shared_experts": "moe.shared_experts", "n_group": "moe.groups", "topk_group": "moe.top_groups",
    "scoring_func": "moe.score", "norm_topk_prob": "moe.normalize_gates", "routed_scaling_factor": "moe.gate_scale",
    "rope_theta": "rope.theta", "mscale": "rope.mscale", "mscale_all_dim": "rope.mscale_all_dim",
    "original_max_position_embeddings": "rope.original_length", "beta_fast": "rope.beta_fast",
    "beta_slow": "rope.beta_slow", "num_nextn_predict_layers": "mtp.depth",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_are_as_published(name: str) -> None:
    model = compose(f"model={name}").model
    for published, place in PLACES.items():
        value: Any = model
        for part in place.split("."):
            value = getattr(value, part)
        assert value == PUBLISHED[name][published], place
    assert model.init_std == 0.006
    assert model.rope.factor == 1, "presets are for pre-training; YaRN came after it"
    assert (model.moe.aux_alpha, model.moe.bias_speed) == ((1e-4, 1e-3) if name == "deepseek_v3" else (1e-3, 0.0))


def test_recipe_of_deepseek_v3_is_as_published() -> None:
    config = compose("run=deepseek_v3")
    optimizer, length = config.optimizer, config.data.sequence_length
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip) == (
        2.2e-4, 0.9, 0.95, 0.1, 1.0,
    )  # fmt: skip
    assert (optimizer.rate.shape, optimizer.rate.warmup_steps, optimizer.moments, length) == (
        RateShape.deepseek, 2000, MomentDtype.bf16, 4096,
    )  # fmt: skip
    batches = schedule_batches(config.run, length)
    assert (batches.size(0), batches.size(config.run.steps - 1)) == (3072, 15360)
    assert batches.before(config.run.steps) * length == pytest.approx(14.8e12, rel=1e-5)
    full = next(level for level in batches.levels if level.batch == 15360)
    assert full.before * length == pytest.approx(469e9, rel=1e-3)
    rates = [rate(optimizer, step, config.run.steps, batches) for step in (1999, 100_000, config.run.steps - 1)]
    assert rates == pytest.approx([2.2e-4, 2.2e-4, 7.3e-6])


def test_recipe_of_deepseek_v2_lite_is_as_published() -> None:
    config = compose("run=deepseek_v2_lite")
    assert (config.optimizer.lr, config.optimizer.rate.warmup_steps, config.run.global_batch) == (4.2e-4, 2000, 4608)
    assert config.run.steps * config.run.global_batch * config.data.sequence_length == pytest.approx(5.7e12, rel=1e-5)
    batches = schedule_batches(config.run, config.data.sequence_length)
    assert rate(config.optimizer, int(0.79 * config.run.steps), config.run.steps, batches) == 4.2e-4
    assert rate(config.optimizer, config.run.steps - 1, config.run.steps, batches) == pytest.approx(4.2e-5, rel=0.02)
    assert config.model.moe.score is ScoreFunction.softmax


def dataclasses_of(schema: Any) -> list[Any]:
    inner = [kind for kind in keys.kinds(schema).values() if is_dataclass(kind)]
    return [schema, *(found for kind in inner for found in dataclasses_of(kind))]


def test_enumerations_are_spelt_as_they_are_stored() -> None:
    """OmegaConf reads members by name and people read values: they have to be the same."""
    for name, key in keys.table(RunConfig).items():
        kind = key.kind
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            assert all(member.name == member.value for member in kind), name


def test_defaults_pass_their_own_rules() -> None:
    for schema in dataclasses_of(RunConfig):
        if all(field.default is not field.default_factory for field in fields(schema)):
            schema()


@dataclass(kw_only=True, slots=True)
class Words:
    """A configuration of a verb's own."""

    prompt: str = "def "
    stop: str | None = None
    tokens: int = 3
    rates: tuple[float, ...] = ()


def test_text_needs_no_second_quoting() -> None:
    prompts = (
        "def f(x):",
        "a, b",
        "[1,",
        "it's",
        "x = y",
        "null",
        "",
        " a ",
        "ünï",
        "${home}",
        "${",
        r"\${a}",
        r"\\${a} \b ${b}",
    )
    for prompt in prompts:
        assert compose_plain(Words, (f"prompt={prompt}",))[0].prompt == prompt
    config, text = compose_plain(Words, ("stop=null", "tokens=5", "rates=[1,2.5]"))
    assert config == Words(tokens=5, rates=(1.0, 2.5))
    assert "tokens: 5" in text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("promt=a", "there is no key promt; did you mean prompt?"),
        ("tokens=few", "tokens=few must be an integer"),
        ("tokens=null", "tokens=null must be an integer"),
        ("rates=1", r"must be a list in brackets, each a number; did you mean \[1\]\?"),
        ("rates=[1", "cannot be read"),
    ],
)
def test_mistakes_in_a_verbs_own_keys(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_plain(Words, (word,))


def test_shared_dataclasses_name_the_place_they_stand_in() -> None:
    with pytest.raises(ValueError, match=r"^top_p=2\.0 must"):
        compose_plain(SamplingConfig, ("top_p=2",))
    with pytest.raises(ValueError, match=r"^run\.sample\.top_p=2\.0 must"):
        compose("run.sample.top_p=2")
