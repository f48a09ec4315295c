import subprocess
import sys
from pathlib import Path

from scalestudy.cluster.cpu_claims import CpuClaim
from scalestudy.cluster.host import usable_cpus


def test_no_cpu_is_claimed_twice_and_a_released_one_is_free_again(tmp_path: Path) -> None:
    usable = usable_cpus()
    claims = [CpuClaim(1, place, tmp_path) for place in range(len(usable))]
    assert [claim.cpus for claim in claims] == [(cpu,) for cpu in usable]
    # Too many: they share.
    assert CpuClaim(1, 0, tmp_path).cpus == tuple(usable)
    claims[0].release()
    again = CpuClaim(1, 5, tmp_path)
    assert again.cpus == (usable[0],)
    for claim in [*claims, again]:
        claim.release()


def test_a_claim_goes_with_the_process_that_held_it(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from scalestudy.cluster.cpu_claims import CpuClaim\n"
    code += f"claim = CpuClaim(1, 0, Path({str(tmp_path)!r})); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    claim = CpuClaim(1, 0, tmp_path)
    assert claim.cpus == (usable_cpus()[0],)
    claim.release()
