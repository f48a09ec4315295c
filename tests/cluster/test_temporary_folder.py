"""Sockets in temporary folders of any length, as multiprocessing makes them."""

import os
import subprocess
import sys
from pathlib import Path

# A child's child passes it an object: by a socket of its own, in a temporary folder of its own.
_PASS_ON = """
import multiprocessing, os, sys, tempfile
from multiprocessing.connection import Listener
from scalestudy.cluster.temporary_folder import make_room_for_sockets

def listen():
    listener = Listener(family="AF_UNIX")
    listener.close()
    with tempfile.NamedTemporaryFile():
        print(os.path.realpath(tempfile.gettempdir()), flush=True)

make_room_for_sockets(os.environ)
listen()
child = multiprocessing.get_context("fork").Process(target=listen)
child.start()
child.join()
"""


def run(folder: Path) -> list[str]:
    told = subprocess.run(
        [sys.executable, "-c", _PASS_ON],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    return told.stdout.splitlines()


def test_sockets_can_be_made_under_any_path_by_us_and_our_children(tmp_path: Path) -> None:
    for length in (1, 50, 100, 200):
        folder = tmp_path / (length * "ü" if length == 100 else length * "x")
        folder.mkdir()
        assert run(folder) == 2 * [str(folder)]
        assert not list(folder.iterdir())
