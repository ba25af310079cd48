"""Read by Python as it starts, in the processes of engines: each imports some 4,000 modules, and collecting garbage was a seventh of that."""

import gc

gc.set_threshold(100_000)
