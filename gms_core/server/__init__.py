"""The server: one process per device that owns physical memory, and the supervisor that keeps these processes alive."""
