"""Metrics of device servers: what each is called, its value in a server's report, and how Prometheus reads it.

Nothing here runs in a device server. That counts, and tells it to whoever asks; see `gms_core.server.observer`.
"""
