"""A round without Lightning: from the workers' gradients to one robust estimate.

`exchange` runs an algorithm over a transport: `worker_side` computes the local workers' messages,
and takes one with a nan for silent; `server_side` decides who is present and makes the estimate;
`outcome` is what comes of it, and `heterogeneity` estimates from outcomes how unlike the workers'
data are. `state_layout` finds which tensors of a state have coordinates. In
simulations alone, `simulation` holds the faults that callbacks install, and `adversary` computes
what liars send. Strategies and diagnostics import it.
"""
