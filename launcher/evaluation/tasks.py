"""``shoestring eval <run> tasks=[...]``: kept weights asked by lm-eval's harness, on one device.

Tasks of the harness fetch their texts from the network where they are not in the cache of ``datasets``. Those in the
folder ``include`` are yours: their YAML may name functions of Python files beside it, which the harness runs.
"""

import logging
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from configs.schema import RunConfig
from launcher.evaluation import job
from launcher.evaluation.config import Config
from launcher.evaluation.find import Found
from launcher.keys import nearest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def answer(found: Found, config: Config) -> int:
    """Prints the harness' table and keeps it with the configuration. ValueError for a task that cannot be had."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks=[{','.join(config.tasks)}] needs lm-eval: pip install 'shoestring[lm-eval]', or pip install lm-eval"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    trained = replace(found.config, precision=config.precision or found.config.precision)
    results = _ask(found, trained, config, _open_tasks(config))
    path = job.make(found.home, trained, job.Request(found.kept, {}, tasks=config.tasks))
    tasks = {name: job.write(_take_numbers(scores)) for name, scores in results["results"].items()}
    job.keep(path, trained, found.kept, tasks=tasks, versions=results["versions"])
    return 0


def _open_tasks(config: Config) -> "TaskManager":
    """Those of ``include`` alone where they are enough: to list all of the harness' takes ten seconds."""
    from lm_eval.tasks import TaskManager

    if config.include is not None:
        try:
            manager = TaskManager(include_path=config.include, include_defaults=False)
        except OSError as error:
            raise ValueError(f"include={config.include} must be a folder of tasks: {error}") from error
        if all(name in manager.all_tasks for name in config.tasks):
            return manager
    manager = TaskManager(include_path=config.include)
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise ValueError(
                f"tasks=[{','.join(config.tasks)}]: there is no task {name}{nearest(name, manager.all_tasks)}"
            )
    return manager


def _ask(found: Found, trained: RunConfig, config: Config, manager: "TaskManager") -> dict[str, Any]:
    # Loads torch: only once the tasks are known to be there.
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from training.harness import HarnessModel
    from training.restore import restore_kept

    model, tokenizer = restore_kept(trained, found.kept, config.device, config.threads)
    asked = HarnessModel(model, tokenizer, found.config.data.sequence_length)
    try:
        results = simple_evaluate(
            asked,
            tasks=list(config.tasks),
            num_fewshot=config.shots,
            limit=config.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except OSError as error:
        raise ValueError(f"tasks=[{','.join(config.tasks)}]: their texts cannot be had: {error}") from error
    print(f"{found.kept.place} after step {found.kept.step}")
    print(make_table(results), end="", flush=True)
    return dict(results or {})


def _take_numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
