import subprocess
import sys
from pathlib import Path

from scalestudy.cluster.cpu_claims import CpuClaim
from scalestudy.cluster.processors import Processor

# Two cores of two hardware threads, numbered as Linux does.
FOUR = [Processor(0, 0, core, core, core + 2 * thread) for core in range(2) for thread in range(2)]


def test_no_cpu_is_claimed_twice_and_a_released_one_is_free_again(tmp_path: Path) -> None:
    claims = [CpuClaim(FOUR, 1, [wanted], tmp_path) for wanted in (0, 1, 2, 3)]
    assert [claim.cpus for claim in claims] == [(0,), (1,), (2,), (3,)]
    # Too many: they share.
    assert CpuClaim(FOUR, 1, [0], tmp_path).cpus == (0, 1, 2, 3)
    claims[2].release()
    again = CpuClaim(FOUR, 1, [0], tmp_path)
    assert again.cpus == (2,)
    for claim in [*claims, again]:
        claim.release()


def test_where_what_is_wanted_is_taken_a_free_core_comes_before_the_sibling_of_a_busy_one(tmp_path: Path) -> None:
    first, second = (CpuClaim(FOUR, 1, [0], tmp_path) for _ in range(2))
    assert [first.cpus, second.cpus] == [(0,), (1,)]
    # No whole core is left: the siblings are.
    third = CpuClaim(FOUR, 2, [0, 2], tmp_path)
    assert third.cpus == (2, 3)
    for claim in (first, second, third):
        claim.release()
    # Nor does a claim of a whole core take half of one that is in use.
    first, whole = CpuClaim(FOUR, 1, [0], tmp_path), CpuClaim(FOUR, 2, [0, 2], tmp_path)
    assert whole.cpus == (1, 3)
    first.release()
    whole.release()


def test_a_claim_that_finds_too_few_holds_none(tmp_path: Path) -> None:
    first = CpuClaim(FOUR, 1, [0], tmp_path)
    assert CpuClaim(FOUR, 4, [0, 1, 2, 3], tmp_path).cpus == (0, 1, 2, 3)
    rest = CpuClaim(FOUR, 3, [1, 2, 3], tmp_path)
    assert rest.cpus == (1, 2, 3)
    first.release()
    rest.release()


def test_a_claim_goes_with_the_process_that_held_it(tmp_path: Path) -> None:
    code = "import os; from pathlib import Path; from scalestudy.cluster.cpu_claims import CpuClaim\n"
    code += "from scalestudy.cluster.processors import Processor\n"
    code += f"claim = CpuClaim([Processor(0, 0, 0, 0, 0)], 1, [0], Path({str(tmp_path)!r})); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    claim = CpuClaim(FOUR, 1, [0], tmp_path)
    assert claim.cpus == (0,)
    claim.release()
