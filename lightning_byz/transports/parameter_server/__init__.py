"""A server that gathers messages over ZeroMQ, closes a round when enough have come, and outlives
its workers.

`transport` is what the engine sees. `desk` decides: who is a member, when a round closes, who is
not waited for; it is a state machine without sockets. `door` holds the connections, in a process of
its own, and lets nobody in without a key. `server` and `client` talk, `protocol` is what they say.
"""

from lightning_byz.transports.parameter_server.errors import (
    LeftBehindError,
    RunIsOverError,
    ServerLostError,
)
from lightning_byz.transports.parameter_server.keys import make_keys
from lightning_byz.transports.parameter_server.transport import ParameterServer

__all__ = ["LeftBehindError", "ParameterServer", "RunIsOverError", "ServerLostError", "make_keys"]
