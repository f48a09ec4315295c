"""What a host's processes agree on: nothing of it is used twice, whoever claims it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalestudy.cluster import claims
from scalestudy.cluster.claims import Claim, claims_folder


def test_all_is_taken_or_nothing_and_who_has_it_is_said(tmp_path: Path) -> None:
    first, second = Claim("process 1, trial /a", tmp_path), Claim("process 2, trial /größe", tmp_path)
    assert first.take(["cpu-0", "gpu-0000:07:00.0"]) is None
    assert second.take(["cpu-1", "cpu-0"]) == "process 1, trial /a"
    assert second.names == frozenset()
    assert first.take(["cpu-1"]) is None
    first.release(["cpu-0"])
    assert second.take(["cpu-0"]) is None
    assert first.take(["cpu-0"]) == "process 2, trial /größe"
    assert first.take(["cpu-2", "cpu-1"]) == "this process"
    assert first.names == {"cpu-1", "gpu-0000:07:00.0"}
    first.release()
    assert second.take(["cpu-1"]) is None


def test_a_claim_goes_with_its_process(tmp_path: Path) -> None:
    code = "import os; from pathlib import Path; from scalestudy.cluster.claims import Claim\n"
    code += f"Claim('x', Path({str(tmp_path)!r})).take(['cpu-0']); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert Claim("y", tmp_path).take(["cpu-0"]) is None


def test_what_is_asked_for_twice_is_taken_once(tmp_path: Path) -> None:
    claim = Claim("x", tmp_path)
    assert claim.take(["gpu-a", "gpu-a"]) is None
    claim.release()
    assert Claim("y", tmp_path).take(["gpu-a"]) is None


def test_without_a_place_for_claims_everything_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim is a courtesy: a planted link or folder, a full disk or one without locks costs no trial."""
    kept = tmp_path / "kept"
    kept.write_text("whole")
    (tmp_path / "cpu-0").symlink_to(kept)
    (tmp_path / "cpu-1").mkdir()
    for holder in ("x", "y"):
        claim = Claim(holder, tmp_path)
        assert claim.take(["cpu-0", "cpu-1"]) is None
        assert claim.names == {"cpu-0", "cpu-1"}
        claim.release()
    assert kept.read_text() == "whole"

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patched:
        patched.setattr("fcntl.flock", no_locks)
        assert Claim("x", tmp_path).take(["cpu-2"]) is None
    monkeypatch.setattr(claims, "_FOLDER", tmp_path / "kept" / "no folder")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "kept"))
    assert claims_folder() is None
    assert Claim("x").take(["cpu-0"]) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be several users")
def test_claims_hold_between_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that all may write Linux lets nobody create a file over another's: then it is opened to be locked."""
    tmp_path.chmod(0o755)
    monkeypatch.setattr(claims, "_FOLDER", tmp_path / "claims")
    folder = claims_folder()
    assert folder is not None
    assert folder == tmp_path / "claims"
    assert folder.stat().st_mode & 0o7777 == 0o1777
    for parent in tmp_path.parents:
        if not os.access(parent, os.X_OK) or parent.stat().st_mode & 0o005 != 0o005:
            monkeypatch.setattr(claims, "_FOLDER", Path(f"/tmp/scalestudy-claims-test-{os.getpid()}"))
            folder = claims_folder()
            assert folder is not None
            break
    one = Claim("root's", folder)
    assert one.take(["cpu-0"]) is None
    code = (
        "import os, sys; from pathlib import Path; from scalestudy.cluster.claims import Claim\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"claim = Claim('nobody', Path({str(folder)!r}))\n"
        "print(claim.take(['cpu-0'])); print(claim.take(['cpu-1'])); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert other.stdout is not None
    assert [other.stdout.readline(), other.stdout.readline()] == ["root's\n", "None\n"]
    assert one.take(["cpu-1"]) == "nobody"
    other.communicate("")
    assert one.take(["cpu-1"]) is None
    one.release()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
