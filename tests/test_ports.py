"""Ports for tests of several processes: nobody is given one that another has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ports import own_port

GIVES = "from ports import own_port; print(*(own_port() for _ in range(300)), flush=True); input()"


def test_processes_that_test_give_no_port_twice() -> None:
    """However many they give, while each lives."""
    command, tests = [sys.executable, "-c", GIVES], Path(__file__).parent
    started = [
        subprocess.Popen(command, cwd=tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    ports = [set(process.stdout.readline().split()) for process in started if process.stdout]
    ports.append({b"%d" % own_port() for _ in range(300)})
    for process in started:
        process.communicate(b"\n")
    assert sum(map(len, ports)) == len(set().union(*ports)) > 4 * 100
