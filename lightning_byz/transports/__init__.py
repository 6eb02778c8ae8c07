"""Transports: how the messages of a round get from the workers to the rule."""

from lightning_byz.transports.all_gather import AllGather
from lightning_byz.transports.base import Message, Received, Transport
from lightning_byz.transports.byzantine import ByzantineTransport
from lightning_byz.transports.in_process import InProcess
from lightning_byz.transports.sharded import Sharded

__all__ = ["AllGather", "ByzantineTransport", "InProcess", "Message", "Received", "Sharded", "Transport"]
