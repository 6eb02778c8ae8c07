"""Lightning's own command line, with the run's configuration in its loggers and mistakes that are
named.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

import lightning_byz
from lightning_byz.cli.mistakes import explained
from lightning_byz.optional_dependencies import require

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
else:
    _home = importlib.import_module(
        "lightning.pytorch.cli"
        if lightning_byz.which_lightning.HOME == "lightning"
        else "pytorch_lightning.cli"
    )
    LightningCLI, SaveConfigCallback = _home.LightningCLI, _home.SaveConfigCallback


_EXTRAS = {"WandbLogger": ("wandb", "wandb"), "TensorBoardLogger": ("tensorboard", "tensorboard")}
"""What loggers need: the package's extra, and its module."""


class ConfigurationError(ValueError):
    """A configuration that no run can be made of; the message says what is wrong."""


class LogConfig(SaveConfigCallback):
    """Writes the run's whole configuration into its loggers as hyperparameters, and to the folder
    of its own, if it has one, as a file.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        first = trainer.loggers[0] if trainer.loggers else None
        # others have one folder for all runs
        self.save_to_log_dir = first is not None and first.log_dir is not None
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


class ByzantineCLI(LightningCLI):
    """LightningCLI, all of whose classes may be named without their module where the name is this
    package's or Lightning's.

    Args:
        arguments: of the command line, the first of which is a subcommand; or a configuration,
            which is made but not run. None: those that the program was called with.

    Raises:
        ConfigurationError: says what is wrong with the arguments or the configuration.
    """

    def __init__(self, arguments: Sequence[str] | Mapping[str, Any] | None = None) -> None:
        run = not isinstance(arguments, Mapping)
        try:
            # it thinks that whoever calls it from a program wants something else
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="LightningCLI's args parameter is intended"
                )
                super().__init__(
                    args=arguments if arguments is None or not run else [*arguments],  # type: ignore[arg-type]
                    run=run,
                    parser_kwargs={"prog": "lightning-byz", "exit_on_error": False},
                    save_config_callback=LogConfig,
                    seed_everything_default=0,
                )
        except argparse.ArgumentError as error:
            raise ConfigurationError(explained(str(error), self._settings())) from error

    @classmethod
    def check(cls, configuration: Mapping[str, Any]) -> None:
        """Reads a configuration and makes nothing of it.

        Raises:
            ConfigurationError: says what is wrong with it.
        """

        class Reads(cls):  # type: ignore[misc, valid-type]
            def instantiate_classes(self) -> None:
                pass

        Reads(configuration)

    def instantiate_classes(self) -> None:
        """Makes the trainer, the model and the data."""
        self._check_loggers()
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            raise ConfigurationError(explained(str(error))) from error

    def _check_loggers(self) -> None:
        """Raises a MissingExtraError if a logger's package is not installed."""
        loggers = self._get(self.config, "trainer.logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            name = str(getattr(logger, "class_path", "")).rpartition(".")[2]
            if name in _EXTRAS:
                require(name, *_EXTRAS[name])

    def _settings(self) -> list[str]:
        """The names of all settings that some subcommand knows."""
        parsers = list(getattr(self, "_subcommand_parsers", {}).values()) or [self.parser]
        return [action.dest for parser in parsers for action in parser._actions]
