"""What outlives a device server: a tiny process that keeps one descriptor of each allocation, so that the next server can adopt the memory."""
