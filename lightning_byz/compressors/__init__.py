"""Compressors: what goes on the wire instead of a dense vector."""

from lightning_byz.compressors.base import Compressor, Field
from lightning_byz.compressors.identity import Identity
from lightning_byz.compressors.quantization import QSGD, BFloat16, Contractive, Float16, NaturalCompression, Sign, TernGrad
from lightning_byz.compressors.sparse import RandK, TopK

__all__ = [
    "QSGD",
    "BFloat16",
    "Compressor",
    "Contractive",
    "Field",
    "Float16",
    "Identity",
    "NaturalCompression",
    "RandK",
    "Sign",
    "TernGrad",
    "TopK",
]
