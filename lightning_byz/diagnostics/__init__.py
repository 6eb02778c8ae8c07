"""Which worker is lying, and where it runs: what callbacks compute and tell people.

Sketches, the suspicion test, worker placement, alerts. Callbacks import it.
"""
