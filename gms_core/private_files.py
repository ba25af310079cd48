"""Files that are one user's alone: opened without following links, checked for what they are, and with a mode that no umask changes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gms_core.errors import PermissionRefused


def open_private(path: Path, flags: int) -> int:
    """Open a regular file of this user that nobody else may read; one that is made has the mode 0600.

    Args:
        path: Where it is. A link is not followed, and a pipe is not waited for.
        flags: Of open(2); some are added.

    Raises:
        PermissionRefused: It is no regular file, has another name besides this one, or is another user's. Nothing was changed.
        OSError: As the kernel says.
    """
    file = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise PermissionRefused(f"{path} is no regular file", hint="Remove it.")
        if found.st_uid != os.geteuid():
            raise PermissionRefused(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}", hint="Remove it.")
        if found.st_nlink > 1:
            raise PermissionRefused(f"{path} has other names too, in directories that may be open to others", hint="Remove it.")
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(file, 0o600)
    except BaseException:
        os.close(file)
        raise
    return file
