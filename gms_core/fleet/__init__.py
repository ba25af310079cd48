"""A fleet: the engines of a node, seen and kept alive from outside. This is what `gms run` and the commands for operators are made of.

What runs inside an engine that fails over is in `gms_core.failover`, which knows nothing of this package: an engine can be started by anybody.
"""
