"""The names that ``Trainer(strategy=NAME)`` knows."""

from __future__ import annotations

from typing import Any

from lightning_byz.algorithms import ByzEF21SGDM, ByzVRMarinaPP, DStar, SignSGDMajorityVote

NAMED_STRATEGIES: dict[str, dict[str, Any]] = {
    "byzantine_robust": {
        "description": (
            "Robust aggregation in place of DDP's all-reduce: survives workers that send garbage"
        )
    },
    "byz_ef21_sgdm": {
        "algorithm": ByzEF21SGDM(),
        "description": "Byz-EF21-SGDM: robust, a tenth of the coordinates on the wire",
    },
    "dstar": {
        "algorithm": DStar(),
        "description": "dSTAR: robust, waits for the first n - f workers only",
    },
    "byz_vr_marina_pp": {
        "algorithm": ByzVRMarinaPP(),
        "description": "Byz-VR-MARINA-PP: robust, variance-reduced, clipped differences",
    },
    "byzantine_robust_find_unused_parameters_true": {
        "description": "The same as byzantine_robust, which needs no such flag"
    },
    "signsgd_majority_vote": {
        "algorithm": SignSGDMajorityVote(),
        "description": "SIGNUM: one bit a coordinate in both directions",
    },
}
"""What ``Trainer(strategy=NAME)`` stands for: arguments of the strategy."""
