"""The command line ``lightning-byz``: Lightning's own ``fit``, ``validate``, ``test`` and
``predict`` from YAML files, ``grid``, ``report``, ``list``, ``keys``, ``demo``.

`runs` is Lightning's command line, with `mistakes` in a configuration named in a sentence. A grid
is read by `grid_file`, `grids` hands its cells to one of the `launchers`, which has them run by
`grid_cells`, and `reports` shows what came of them, with pictures by `report_figures`. `catalogue`
lists all parts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import lightning_byz
from lightning_byz.optional_dependencies import MissingExtraError, require

_LIGHTNING = {
    "fit": (
        "train, with everything (model, data, rule, attack) set in a YAML file: lightning-byz fit "
        "--config configs/digits.yaml"
    ),
    "validate": "validate a checkpoint",
    "test": "test a checkpoint",
    "predict": "predict with a checkpoint",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command and its options; None: those that the program was called with.

    Returns:
        the exit status: 0; 1 if an optional dependency is missing, or a cell of a grid failed; 2 if
            a configuration is wrong, and the message says what.

    Raises:
        SystemExit: with status 2 if the command itself is wrong.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(
            0, os.getcwd()
        )  # as `python -m` does, so that a class_path may name a module of this folder
    try:
        if arguments and arguments[0] in _LIGHTNING:
            return _run_lightning(arguments, given=arguments != sys.argv[1:])
        options = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        status = run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MissingExtraError as error:
        print(f"lightning-byz: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-byz",
        description="Byzantine-robust training for PyTorch Lightning.",
        epilog="<command> --help says more.",
    )
    parser.add_argument(
        "--version", action="version", version=f"lightning-byz {lightning_byz.__version__}"
    )
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    about = (
        "train with ten workers of which three lie, by averaging and robustly, in less than a "
        "minute"
    )
    demo = commands.add_parser("demo", help=about, description=about[0].upper() + about[1:] + ".")
    demo.add_argument(
        "--output",
        default="byzantine_demo.png",
        help="where to write the picture (default: %(default)s, in this folder)",
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="seed of all random streams (default: %(default)s)"
    )
    demo.add_argument(
        "--epochs",
        type=int,
        default=20,
        help="epochs of each of the three runs (default: %(default)s)",
    )
    demo.set_defaults(run=_demo)
    about = (
        "every algorithm, rule, attack, compressor, ... with its paper, or all about one of them"
    )
    parts = commands.add_parser("list", help=about, description=about[0].upper() + about[1:] + ".")
    parts.add_argument(
        "name",
        nargs="?",
        help="a kind (rules, attacks, ...) or a part (Krum, ALIE, ...); default: all kinds",
    )
    parts.set_defaults(run=_list)
    about = (
        "run a grid of rules, attacks, numbers of liars, ... in parallel; interrupted, it goes on "
        "where it stopped"
    )
    grid = commands.add_parser("grid", help=about, description=about[0].upper() + about[1:] + ".")
    grid.add_argument("file", type=Path, help="the grid file, such as configs/grids/digits.yaml")
    grid.add_argument(
        "--jobs",
        type=_positive,
        help="most runs at a time (default: one per core here, as many as fit on a cluster)",
    )
    grid.add_argument(
        "--launcher",
        choices=("local", "slurm", "ray"),
        default="local",
        help="where runs take place: processes here, jobs of SLURM, tasks of Ray (default: local)",
    )
    grid.add_argument(
        "--output",
        type=Path,
        help="folder for the results (default: what the file says, or outputs/grids/NAME)",
    )
    grid.add_argument(
        "--dry-run", action="store_true", help="check the file, list its cells, and run none"
    )
    grid.set_defaults(run=_grid)
    about = "make pictures and one page of HTML from a grid's folder, or from a run's"
    report = commands.add_parser(
        "report", help=about, description=about[0].upper() + about[1:] + "."
    )
    report.add_argument(
        "folder",
        type=Path,
        help="where `lightning-byz grid` wrote results.csv, or a CSVLogger metrics.csv",
    )
    report.set_defaults(run=_report)
    about = "make the keys of a parameter server and its workers, and say which host needs which"
    keys = commands.add_parser("keys", help=about, description=about[0].upper() + about[1:] + ".")
    keys.add_argument(
        "processes", type=_positive, help="number of processes of the run, the server included"
    )
    keys.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("keys"),
        help="where to write them (default: %(default)s)",
    )
    keys.set_defaults(run=_keys)
    for name, text in _LIGHTNING.items():
        commands.add_parser(name, help=text)  # for --help; LightningCLI parses them
    return parser


def _demo(options: argparse.Namespace) -> int:
    require("lightning-byz demo", "demo", "matplotlib", "rich", "sklearn")
    from lightning_byz.demo import quickstart

    quickstart.main(options.output, options.seed, options.epochs)
    return 0


def _list(options: argparse.Namespace) -> int:
    require("lightning-byz list", "cli", "rich")
    from rich.console import Console

    from lightning_byz.cli import catalogue

    if options.name is not None and options.name not in catalogue.KINDS:
        try:
            print(catalogue.described(options.name))
        except ValueError as error:
            print(f"lightning-byz list: {error}", file=sys.stderr)
            return 2
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = shutil.get_terminal_size(
            (100, 24)
        ).columns  # what COLUMNS says, if it is set
    console.print(catalogue.table([options.name] if options.name else catalogue.KINDS))
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1. Found {text}.")
    return number


def _grid(options: argparse.Namespace) -> int:
    require("lightning-byz grid", "cli", "jsonargparse", "rich")
    from rich.console import Console

    from lightning_byz.cli.grid_file import Grid, GridError
    from lightning_byz.cli.grids import list_cells, run_grid

    console = Console()
    try:
        grid = Grid.read(options.file)
        output = options.output or grid.output
        if options.dry_run:
            list_cells(grid, output, console)
            return 0
        complete = run_grid(grid, output, options.jobs, console, options.launcher)
    except GridError as error:
        print(f"lightning-byz grid: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    if find_spec("matplotlib") is None:
        print("For pictures: pip install 'lightning-byz[plot]', then lightning-byz report", output)
    else:
        _report(argparse.Namespace(folder=output))
    return 0 if complete else 1


def _keys(options: argparse.Namespace) -> int:
    require("lightning-byz keys", "server", "zmq")
    if options.processes < 2:
        print(
            "lightning-byz keys: a parameter server has two processes at least. Found 1.",
            file=sys.stderr,
        )
        return 2
    try:
        folder = lightning_byz.make_keys(options.folder, options.processes)
    except FileExistsError as error:
        print(f"lightning-byz keys: {error}", file=sys.stderr)
        return 2
    print(f"{folder.resolve()} holds the keys of {options.processes} processes.")
    print("The host of rank 0, the server, needs server.key_secret and all files *.key.")
    print("The host of rank r needs server.key and rank{r}.key_secret, and no other secret.")
    return 0


def _report(options: argparse.Namespace) -> int:
    require("lightning-byz report", "plot", "matplotlib", "jinja2")
    from lightning_byz.cli.reports import ReportError, write_report

    try:
        page = write_report(options.folder)
    except ReportError as error:
        print(f"lightning-byz report: {error}", file=sys.stderr)
        return 2
    print(f"Report: {page.resolve()}, and its pictures beside it as PNG and PDF.")
    return 0


def _run_lightning(arguments: list[str], given: bool) -> int:
    require(f"lightning-byz {arguments[0]}", "cli", "jsonargparse", "rich")
    from lightning_byz.cli.runs import ByzantineCLI, ConfigurationError

    try:
        ByzantineCLI(arguments if given else None)
    except ConfigurationError as error:
        print(f"lightning-byz {arguments[0]}: {error}", file=sys.stderr)
        return 2
    return 0
