"""``gms identity``: the digest of a checkpoint, by which engines know whether what is published is what they need."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from gms_core.cli.options import count, format_size, output_option
from gms_core.errors import CheckpointNotFound

SCHEMA = "gms-identity/1"


@click.command(short_help="Show the digest of a checkpoint.")
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Read all its bytes, even if the digest is known; what is read is remembered.")
@output_option("text", "json")
def identity(checkpoint: Path, force: bool, output: str) -> None:
    """Show the content digest of CHECKPOINT, a folder with weight files or one such file, as engines compare it.

    Files that have not changed since they were read last are not read again.
    """
    from gms_core.checkpoint import WEIGHTS, cached_digest, content_digest, find_weights

    files = [checkpoint] if checkpoint.is_file() else find_weights(checkpoint)
    if not files:
        raise CheckpointNotFound(f"{checkpoint} has no weight files ({', '.join(WEIGHTS)})", hint="Name a folder that has, or a file.")
    known = None if force else cached_digest(files)
    began = time.monotonic()
    digest = known or content_digest(files, force=force)
    seconds = time.monotonic() - began
    size = sum(path.stat().st_size for path in files)
    if output == "json":
        told = {"content": digest, "files": [str(path) for path in files], "bytes": size, "read": known is None, "seconds": seconds}
        click.echo(json.dumps({"schema": SCHEMA, **told}, indent=2))
        return
    how = "known already, and not read again" if known else f"read in {seconds:.1f} s, {format_size(int(size / max(seconds, 1e-9)))} a second"
    click.echo(f"{digest}\n{format_size(size)} in {count(len(files), 'file')}, {how}")
