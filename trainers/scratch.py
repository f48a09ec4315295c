"""Temporary folders of a process that leaves without its interpreter's clean-up."""

import tempfile

_made: "list[tempfile.TemporaryDirectory[str]]" = []


def scratch_folder(prefix: str) -> str:
    """Make a temporary folder that goes with `remove_scratch`, whichever way the process ends."""
    # Others may still write there, or clean up themselves, when this process is done with it.
    _made.append(tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True))
    return _made[-1].name


def remove_scratch() -> None:
    """Remove all that `scratch_folder` has made."""
    while _made:
        _made.pop().cleanup()
