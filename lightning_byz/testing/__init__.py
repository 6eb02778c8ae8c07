"""Laws that every part should hold, runnable on anybody's.

``check_aggregator(rule)``, ``check_algorithm(algorithm)``, ``check_attack(attack)``,
``check_compressor(compressor)`` and ``check_transport(make)`` raise an AssertionError that lists
every law that is broken. ``aggregator_laws(rule)`` and its siblings answer with all laws and what
was found. A rule is anything that maps a matrix ``[n, d]`` to a vector ``[d]``, of this package or
of another.
"""

from lightning_byz.testing.aggregators import AnyRule, aggregator_laws, check_aggregator
from lightning_byz.testing.algorithms import algorithm_laws, check_algorithm
from lightning_byz.testing.attacks import attack_laws, check_attack
from lightning_byz.testing.compressors import check_compressor, compressor_laws
from lightning_byz.testing.laws import Law
from lightning_byz.testing.transports import check_transport, transport_laws

__all__ = [
    "AnyRule",
    "Law",
    "aggregator_laws",
    "algorithm_laws",
    "attack_laws",
    "check_aggregator",
    "check_algorithm",
    "check_attack",
    "check_compressor",
    "check_transport",
    "compressor_laws",
    "transport_laws",
]
