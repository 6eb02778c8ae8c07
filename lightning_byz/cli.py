"""The command line: ``lightning-byz demo``, and Lightning's own ``fit``, ``validate``, ``test`` and ``predict`` from YAML files."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import lightning_byz
from lightning_byz.extras import MissingExtraError, require

_LIGHTNING = {
    "fit": "train, with everything (model, data, rule, attack) set in a YAML file: lightning-byz fit --config configs/digits.yaml",
    "validate": "validate a checkpoint",
    "test": "test a checkpoint",
    "predict": "predict with a checkpoint",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command and its options; None: those that the program was called with.

    Returns:
        the exit status: 0, or 1 if an optional dependency is missing.

    Raises:
        SystemExit: with status 2 if the arguments or a configuration file are wrong; the message says what.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments and arguments[0] in _LIGHTNING:
            _run_lightning(arguments, given=arguments != sys.argv[1:])
            return 0
        options = _parser().parse_args(arguments)
        _demo(options)
    except MissingExtraError as error:
        print(f"lightning-byz: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-byz", description="Byzantine-robust training for PyTorch Lightning.", epilog="<command> --help says more."
    )
    parser.add_argument("--version", action="version", version=f"lightning-byz {lightning_byz.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    about = "train with ten workers of which three lie, by averaging and robustly, in less than a minute"
    demo = commands.add_parser("demo", help=about, description=about[0].upper() + about[1:] + ".")
    demo.add_argument(
        "--output", default="byzantine_demo.png", help="where to write the picture (default: %(default)s, in this folder)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of all random streams (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=20, help="epochs of each of the three runs (default: %(default)s)")
    for name, text in _LIGHTNING.items():
        commands.add_parser(name, help=text)  # for --help; LightningCLI parses them
    return parser


def _demo(options: argparse.Namespace) -> None:
    require("lightning-byz demo", "demo", "matplotlib", "rich", "sklearn")
    from lightning_byz.demo import quickstart

    quickstart.main(options.output, options.seed, options.epochs)


def _run_lightning(arguments: list[str], given: bool) -> None:
    require(f"lightning-byz {arguments[0]}", "cli", "jsonargparse", "rich")
    home: Any = importlib.import_module("lightning.pytorch.cli" if lightning_byz._home == "lightning" else "pytorch_lightning.cli")
    try:
        home.LightningCLI(
            args=arguments if given else None,
            parser_kwargs={"prog": "lightning-byz", "exit_on_error": False},
            seed_everything_default=0,
        )
    except argparse.ArgumentError as error:
        print(f"lightning-byz {arguments[0]}: {_explained(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def _explained(message: str) -> str:
    """What a parser has to say, after the one mistake that it is about, where that can be found in it."""
    unknown = re.search(r"module '([\w.]+)' has no attribute '(\w+)'|Expected a dot import path string: (\w+)", message)
    unwanted = re.search(r"given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message)
    if unknown is not None:
        module, name = unknown[1] or "lightning_byz", unknown[2] or unknown[3]
        known = getattr(sys.modules.get(module), "__all__", [])
        near = difflib.get_close_matches(name, known, n=1)
        summary = f"there is no class {name} in {module}."
        summary += f" Did you mean {module}.{near[0]}?" if near else ""
        summary += f" It offers {', '.join(known)}." if known else ""
    elif unwanted is not None:
        summary = f"{unwanted[1]} has no argument {unwanted[2]!r}."
    else:
        return message
    return f"{summary}\n\nIn detail: {message}"


if __name__ == "__main__":
    sys.exit(main())
