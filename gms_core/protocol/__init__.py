"""How client and server talk: typed messages, frames, descriptors and credentials on a Unix socket."""
