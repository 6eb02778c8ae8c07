"""Which worker is lying, and where it runs: what callbacks compute and tell people.

`rounds` reads a round's outcome, `suspicion` is the test of who lies, on short vectors from
`sketch`. `replicas` compares ranks that should hold the same. `worker_placement` knows hosts and
devices, `alerts` reach people. Callbacks import it; it does not know Lightning.
"""
