"""Transports: how the messages of a round get from the workers to the rule.

`base` is the interface, `messages` what travels through it. `in_process` sends nothing.
`all_gather` and `sharded` are collectives of torch.distributed, with what they share in
`collective`; `ranks` says which processes one of them connects. `meeting` tells ranks that are out
of step, or dead, by name. `parameter_server` survives its workers. `wire` packs tensors, `parsing`
reads what other processes say with suspicion: logged values, names, shapes, texts.
"""

from lightning_byz.transports.all_gather import AllGather
from lightning_byz.transports.base import Downlink, Transport, Uplink
from lightning_byz.transports.in_process import InProcess
from lightning_byz.transports.meeting import OutOfStepError, RankLostError
from lightning_byz.transports.messages import Awaited, Message, Received, Verdict
from lightning_byz.transports.parameter_server import (
    LeftBehindError,
    ParameterServer,
    RunIsOverError,
    ServerLostError,
    make_keys,
)
from lightning_byz.transports.sharded import Sharded

__all__ = [
    "AllGather",
    "Awaited",
    "Downlink",
    "InProcess",
    "LeftBehindError",
    "Message",
    "OutOfStepError",
    "ParameterServer",
    "RankLostError",
    "Received",
    "RunIsOverError",
    "ServerLostError",
    "Sharded",
    "Transport",
    "Uplink",
    "Verdict",
    "make_keys",
]
