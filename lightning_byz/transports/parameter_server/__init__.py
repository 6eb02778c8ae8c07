"""A server that gathers messages over ZeroMQ, closes a round when enough have come, and outlives its workers."""

from lightning_byz.transports.parameter_server.errors import LeftBehindError, RunIsOverError, ServerLostError
from lightning_byz.transports.parameter_server.keys import make_keys
from lightning_byz.transports.parameter_server.transport import ParameterServer

__all__ = ["LeftBehindError", "ParameterServer", "RunIsOverError", "ServerLostError", "make_keys"]
