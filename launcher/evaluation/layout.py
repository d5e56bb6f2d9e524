"""A run's configuration as its weights are to be measured: another layout, and nothing that trains."""

from dataclasses import replace

from configs.cluster import ClusterConfig
from configs.preflight import PreflightConfig, Verify, When
from configs.schema import RunConfig
from launcher.evaluation.config import Config
from parallel.topology import Topology
from training.config import CheckpointConfig, Compile, OptimizerConfig, ProfileConfig, RampConfig, SamplingConfig

BATCHES = 4  # micro-batches for each stage: what every schedule takes


def lay_out(trained: RunConfig, config: Config, topology: Topology) -> RunConfig:
    """``trained`` on ``topology``. ValueError where the model does not fit it."""
    parallel, run = config.parallel, trained.run
    size = config.micro_batch or run.micro_batch
    run = replace(
        run,
        micro_batch=size,
        # No step is taken: a batch that the layout can divide.
        global_batch=size * topology.dp * BATCHES * topology.pp * parallel.pipeline.virtual,
        ramp=RampConfig(),
        device=config.device,
        threads=config.threads,
        compile=Compile.off,
        sample=SamplingConfig(),
        sinks=(),
    )
    return replace(
        trained,
        parallel=parallel,
        precision=config.precision or trained.precision,
        run=run,
        optimizer=OptimizerConfig(lr=trained.optimizer.lr),
        checkpoint=CheckpointConfig(check=trained.checkpoint.check),
        profile=ProfileConfig(),
        init_from=None,
        cluster=ClusterConfig(),
        preflight=PreflightConfig(when=When.never),
        verify=Verify.skip,
    )
