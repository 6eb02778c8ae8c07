"""A conformance kit: what every rule, compressor and attack should hold, runnable on anybody's.

``check_aggregator(rule)``, ``check_compressor(compressor)`` and ``check_attack(attack)`` raise an AssertionError that lists every law that is broken;
``aggregator_laws(rule)`` and its siblings answer with all laws and what was found. A rule is anything that maps a matrix ``[n, d]`` to a vector
``[d]``, of this package or of another.
"""

from lightning_byz.testing.aggregators import AnyRule, aggregator_laws, check_aggregator
from lightning_byz.testing.attacks import attack_laws, check_attack
from lightning_byz.testing.compressors import check_compressor, compressor_laws
from lightning_byz.testing.laws import Law

__all__ = [
    "AnyRule",
    "Law",
    "aggregator_laws",
    "attack_laws",
    "check_aggregator",
    "check_attack",
    "check_compressor",
    "compressor_laws",
]
