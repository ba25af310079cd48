"""``make bench``: all benchmarks that need no engine, in one document, each figure beside its peer or its physical limit from the same run.

It is no part of the ``gms`` package: other projects' loaders are measured here, and GMS depends on none of them.
"""
