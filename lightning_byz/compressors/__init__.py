"""Compressors: what goes on the wire instead of a dense vector."""

from lightning_byz.compressors.base import Compressor, Field
from lightning_byz.compressors.identity import Identity
from lightning_byz.compressors.sparse import RandK, TopK

__all__ = ["Compressor", "Field", "Identity", "RandK", "TopK"]
