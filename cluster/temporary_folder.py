"""A temporary folder in which sockets can be made, however long its path is."""

import os
import tempfile
from collections.abc import MutableMapping

# A socket's path has at most 107 bytes, and whoever makes one in a folder of its own adds this many:
# /pymp-xxxxxxxx/listener-xxxxxxxx (multiprocessing), /torch-shm-dir-xxxxxx/manager.sock (torch).
_LONGEST_BYTES = 107 - 40


def make_room_for_sockets(environ: MutableMapping[str, str]) -> None:
    """Give the temporary folder of this process and its children a short name, if its own is too long.

    It stays the same folder: the short name leads there as long as this process lives, and nothing is left behind.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= _LONGEST_BYTES:
        return
    opened = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    environ["TMPDIR"] = tempfile.tempdir = f"/proc/{os.getpid()}/fd/{opened}"
