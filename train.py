"""Train and evaluate: `python train.py --config=configs/brain.py [--workdir=runs/brain]`."""

from absl import flags
from ml_collections import config_flags

from gridreg_jax.doorway import join_processes, main
from gridreg_jax.errors import InputError

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, a Python file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/<name of the config>.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes: host:port of process 0; 'auto' under Slurm, Open MPI, Kubernetes, on TPUs."
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process", None, "Which of them this one is, from 0.", lower_bound=0)
flags.mark_flag_as_required("config")


def run(_) -> None:
    if "systems" in CONFIG.value and COORDINATOR.value:
        raise InputError("several systems are compared by one process: leave out --coordinator")
    join_processes(COORDINATOR.value, PROCESSES.value, PROCESS.value)

    from gridreg_jax.evaluation.evaluate import evaluate
    from gridreg_jax.training.loop import fit

    config, workdir = CONFIG.value, WORKDIR.value or f"runs/{CONFIG.value.name}"
    if "systems" in config:
        from configs.compare import stages_of
        from gridreg_jax.evaluation.compare import compare

        try:
            stages = {system: stages_of(config, system) for system in config.systems}
        except ValueError as error:
            raise InputError(error) from error
        compare(stages, workdir)
        return
    # Evaluation is a matter of one process: with several, eval.py does it.
    if fit(config, workdir) and not COORDINATOR.value:
        evaluate(workdir)


if __name__ == "__main__":
    main(run)
