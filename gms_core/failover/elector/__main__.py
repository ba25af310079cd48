"""The elector of one engine: ``python -m gms_core.failover.elector``; see `gms_core.failover.elector.process`."""

from gms_core.failover.elector.process import main

if __name__ == "__main__":
    main()
