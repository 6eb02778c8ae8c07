"""The log of a run is shown where the program has set up no logging, and only there."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_byz.lightning import ByzantineRobustStrategy

log = logging.getLogger("lightning_byz")


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The logger as it is before there is a strategy."""
    monkeypatch.setattr(log, "handlers", [])
    level = log.level
    log.setLevel(logging.NOTSET)
    yield
    log.setLevel(level)


def said(capsys: pytest.CaptureFixture[str], *of_root: logging.Handler) -> list[str]:
    """What is shown of two lines, given the root logger's handlers."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logging.getLogger(), "handlers", list(of_root))
        log.info("chosen")
        log.warning("beware")
    return capsys.readouterr().err.splitlines()


def test_what_the_strategy_has_chosen_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        ByzantineRobustStrategy()
    assert said(capsys) == ["chosen", "beware"]


def test_other_ranks_than_the_first_show_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ByzantineRobustStrategy()
    monkeypatch.setattr(rank_zero_only, "rank", 2, raising=False)
    assert said(capsys) == ["beware"]


def test_a_program_that_logs_shows_lines_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Also if it begins to after the strategy was made."""
    ByzantineRobustStrategy()
    assert said(capsys, logging.NullHandler()) == []


@pytest.mark.parametrize("level", [logging.WARNING, logging.DEBUG])
def test_a_level_and_handlers_of_ones_own_stay(
    level: int, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = logging.NullHandler()
    log.addHandler(mine)
    log.setLevel(level)
    ByzantineRobustStrategy()
    assert (log.handlers, log.level) == ([mine], level)
    assert said(capsys) == []
