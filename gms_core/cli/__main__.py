"""``python -m gms_core.cli`` is the ``gms`` command."""

from gms_core.cli import main

main()
