"""`jmoe train`."""

import argparse

from jmoe.cli import arguments

SUMMARY = "Trains an experiment, evaluates and saves it; resumes if the work folder holds an unfinished run of it."
EXAMPLE = "jmoe train experiments/digits_vmoe.py --workdir runs/digits --set model.moe.router.k=2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe train`."""
    arguments.add_experiment(parser)
    arguments.add_processes(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and process 0 prints the summary of the run."""
    from jmoe.train.experiment import load_experiment

    config = load_experiment(args.experiment, args.overrides)  # first: most mistakes are found here, in no time

    from jmoe.train.loop import train

    with arguments.started(args) as hosts:
        summary = train(config, args.workdir)
        if hosts.process == 0:
            print(summary)
    return 0
