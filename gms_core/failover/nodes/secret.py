"""What agents of one engine know and nobody else: the key that their messages are signed with."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gms_core.errors import ConfigurationError

LEAST_BYTES = 16
MOST_BYTES = 4096
HINT = "Make one, and give every node a copy: (umask 077; head -c 32 /dev/urandom | base64 > FILE)"


def read_secret(path: Path) -> bytes:
    """The content of a secret's file, without white space around it.

    Args:
        path: Of a file that nobody but its owner, who is this user or root, may read. Links are followed, as Kubernetes mounts secrets by them.

    Raises:
        ConfigurationError: It cannot be read, others may read it, or it is too short or long.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigurationError(f"the secret {path} cannot be read: {error.strerror}", hint=HINT) from error
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise ConfigurationError(f"the secret {path} is no regular file", hint=HINT)
        if about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o077:
            raise ConfigurationError(f"the secret {path} can be read by others than this user", hint=f"chmod 600 {path}")
        secret = os.read(file, MOST_BYTES + 1).strip()
    finally:
        os.close(file)
    if not LEAST_BYTES <= len(secret) <= MOST_BYTES:
        raise ConfigurationError(f"the secret {path} has {len(secret)} bytes, and must have {LEAST_BYTES} to {MOST_BYTES}", hint=HINT)
    return secret
