"""The agent of one node; see `gms_core.failover.nodes.agent`."""

import logging
import sys

from gms_core.failover.nodes.agent import main

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s gms[%(process)d] %(message)s")
    sys.exit(main())
