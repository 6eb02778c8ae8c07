"""A round without Lightning: from the workers' gradients to one robust estimate.

`exchange` runs an algorithm over a transport. `state_layout` knows which tensors of a state have
coordinates. `adversary` computes what simulated liars send. Strategies and diagnostics import it.
"""
