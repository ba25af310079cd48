"""``gms snapshot serve`` and ``gms snapshot pull``: published memory goes from one machine to another, without files."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import click

from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.options import count, format_size, output_option, ranks_option, runtime_dir_option
from gms_core.cli.refusal import Refusal
from gms_core.cli.snapshot import device_option, option_option, pairs, publishing_options, snapshot, workers_option
from gms_core.errors import GmsError

secret_option = click.option(
    "--secret-file",
    "secret",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with the secret that both machines have, and nobody else may read.",
)


@snapshot.command(short_help="Let other machines pull what a pool has committed.")
@click.option("--listen", "where", required=True, metavar="HOST:PORT", help="Address of this machine at which others ask.")
@secret_option
@click.option("--pool", default="weights", show_default=True, help="The pool.")
@device_option
@ranks_option
@runtime_dir_option
def serve(where: str, secret: Path, pool: str, devices: tuple[str, ...], ranks: bool, runtime_dir: Path) -> None:
    """Let machines that have the secret read what a pool has committed, on every device that has it, until this command is told to end.

    It holds a read lease: engines serve meanwhile, and the generation stays. The network has to be a trusted one: nothing is encrypted.
    """
    from gms_core.cli.snapshot_places import sources
    from gms_core.snapshot.peers.handshake import Address, address, read_secret
    from gms_core.snapshot.peers.network import keep_to
    from gms_core.snapshot.peers.serving import Serving, listen
    from gms_core.snapshot.peers.serving import serve as answer_all

    known = read_secret(secret)
    with listen(address(where)) as listener:
        places = sources(runtime_dir, pool, devices, ranks=ranks)
        keep_to(listener.getsockname()[0])
        telling = os.dup(1)
        os.dup2(2, 1)  # what the library prints
        code = int(ExitCode.FAILURE)
        try:
            with Serving(places, lambda what: click.echo(what, err=True)) as serving:
                manifest = serving.manifest
                facts = f"{format_size(manifest.size)} in {count(len(manifest.images), 'image')}"
                line = f"serving {manifest.name}@{manifest.version}, {facts}, at {Address(*listener.getsockname()[:2])}"
                os.write(telling, f"{line}\n".encode())
                answer_all(serving, listener, known)
            code = int(ExitCode.OK)
        except GmsError as error:
            refusal = Refusal(error, as_json=False, debug=False)
            refusal.show()
            code = refusal.exit_code
        except KeyboardInterrupt:
            code = int(ExitCode.INTERRUPTED)
        except BaseException:  # noqa: BLE001 - told, and then the process ends
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # the destructors of UCX's libraries crash, and this command's exit code would be that of the crash


@snapshot.command(short_help="Publish what another machine serves.")
@click.argument("peer", metavar="PEER")
@secret_option
@publishing_options
@option_option
@workers_option("GMS_LOAD_WORKERS")
@runtime_dir_option
@output_option("text", "json")
def pull(
    peer: str,
    secret: Path,
    pool: str,
    devices: tuple[str, ...],
    expected: tuple[str, ...],
    if_missing: bool,
    replace: int | None,
    pin: bool,
    timeout: float,
    memory_timeout: float,
    options: tuple[str, ...],
    workers: int | None,
    runtime_dir: Path,
    output: str,
) -> None:
    """Read what gms snapshot serve offers at PEER, HOST:PORT, and publish it as the next generation of the pools that it is in there.

    Every byte is compared with its checksum, and nothing is published before all images have arrived.
    """
    from gms_core.cli.snapshot_places import targets
    from gms_core.cli.snapshot_progress import progress, show
    from gms_core.snapshot.config import snapshot_config
    from gms_core.snapshot.peers.handshake import address
    from gms_core.snapshot.peers.pulling import pull as pull_from

    config = snapshot_config({"load_workers": workers, "options": pairs(options)})
    with progress(output) as watch:
        outcome = pull_from(
            address(peer),
            secret.absolute(),
            lambda images: targets(images, runtime_dir, devices, pool),
            watch,
            expected=pairs(expected),
            if_missing=if_missing,
            replace=replace,
            pin=pin,
            workers=config.load_workers,
            options=config.options,
            timeout_s=timeout,
            memory_timeout_s=memory_timeout,
        )
    show("pull", outcome, output)
