"""Compressors: what goes on the wire instead of a dense vector.

`base` is what one has to be: a layout, `encode` and `decode`. `identity` sends everything, `sparse`
few coordinates, `quantization` few bits (`bits` packs them), `low_rank` factors of matrices.
`blocks` applies one to parts of a vector: per tensor, per shard.
"""

from lightning_byz.compressors.base import Compressor, Field, WireFormat
from lightning_byz.compressors.blocks import PerShard, PerTensor
from lightning_byz.compressors.identity import Identity
from lightning_byz.compressors.low_rank import LowRank
from lightning_byz.compressors.quantization import (
    QSGD,
    BFloat16,
    Contractive,
    Float16,
    NaturalCompression,
    ScaledSign,
    Sign,
    TernGrad,
)
from lightning_byz.compressors.sparse import ContractiveRandK, RandK, TopK

__all__ = [
    "QSGD",
    "BFloat16",
    "Compressor",
    "Contractive",
    "ContractiveRandK",
    "Field",
    "Float16",
    "Identity",
    "LowRank",
    "NaturalCompression",
    "PerShard",
    "PerTensor",
    "RandK",
    "ScaledSign",
    "Sign",
    "TernGrad",
    "TopK",
    "WireFormat",
]
