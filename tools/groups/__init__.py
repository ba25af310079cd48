"""Groups of many ranks without an engine: what it takes them to get leases, to attach and to fail over, against their number."""
