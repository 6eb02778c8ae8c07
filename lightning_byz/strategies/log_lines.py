"""Shows the log of a run, where the program has set up no logging: what the strategy has chosen is
then on standard error, beside Lightning's own lines.
"""

from __future__ import annotations

import logging
import sys

from lightning_utilities.core.rank_zero import rank_zero_only

log = logging.getLogger("lightning_byz")


class _StandardError(logging.Handler):
    """Prints lines of rank 0, and warnings of all ranks; nothing if the root logger has handlers,
    which print them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        first = not getattr(rank_zero_only, "rank", 0)
        return not logging.getLogger().handlers and (first or record.levelno >= logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


def show_log() -> None:
    """From here on. A level or handlers that the program has given to the logger "lightning_byz"
    stay.
    """
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_StandardError())
