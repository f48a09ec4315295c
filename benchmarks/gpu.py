"""What one GPU shows: our loop against a bare one and timm's, every execution and precision, joules, the roofline, …

Usage: python benchmarks/gpu.py OUT.json [--budget-s 540] [--only REGEX] [--dry-run]

Needs torch, and the wheels of `make gpu-bundle`. Every case is a fresh process with a time limit, and stops its rounds
early when the budget runs out; OUT.json is written after every case. A further call with the same OUT.json goes on with
what is missing for the same card. `--dry-run` walks every case with tiny sizes on a CPU: its figures mean nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_plan import Case, plan

from scalestudy.launch.children import kill_group, wait_for
from scalestudy.trainers.files import write_atomically
from scalestudy.trainers.trainer import refusal

HERE = Path(__file__).resolve().parent
# What a case is given between the end of its rounds and its end by force.
_MARGIN_S = 8.0
_UNREACHED = "the run was ended before it came to this case"


def main() -> None:
    """Measure all there is time for; exits 1 where a case failed."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("out", type=Path, metavar="OUT.json")
    asked.add_argument("--budget-s", type=float, default=540.0)
    asked.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="cases whose name it finds")
    asked.add_argument("--dry-run", action="store_true")
    given = asked.parse_args()
    ends_s = time.monotonic() + given.budget_s
    try:
        runs = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    except (ValueError, KeyError, TypeError):
        asked.error(f"{given.out}: holds no runs of this script; name another file")
    # The roofline always: the others are set against that of the same card.
    cases = [case for case in plan(given.dry_run) if case.kind == "roofline" or re.search(given.only, case.name)]
    run: dict[str, Any] = {
        "began_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "dry_run": given.dry_run,
        "budget_s": given.budget_s,
        "cases": {},
        "left_out": {case.name: _UNREACHED for case in cases},
    }
    write(given.out, [*runs, run])
    for case in cases:
        found = one_case(case, run, runs, ends_s, given.budget_s)
        if why := found.get("left_out"):
            run["left_out"][case.name] = why
        else:
            del run["left_out"][case.name]
            run["cases"][case.name] = found
        print(json.dumps({case.name: found}), flush=True)
        write(given.out, [*runs, run])
    sys.exit(any(found["outcome"] == "failed" for found in run["cases"].values()))


def one_case(
    case: Case, run: dict[str, Any], before: list[dict[str, Any]], ends_s: float, budget_s: float
) -> dict[str, Any]:
    """Return what a case has shown, or why it is left out."""
    if case.kind == "train" and (refused := refusal(case.trial())):
        return {"left_out": f"refused: {refused[0]}: {refused[1]}"}
    roofline = run["cases"].get("roofline", {})
    if (card := card_of(run)) and (earlier := measured_before(case, card, before)):
        return {"left_out": f"measured on this card by the run of {earlier}"}
    left_s = ends_s - time.monotonic()
    if left_s < case.least_s + _MARGIN_S:
        return {
            "left_out": f"{max(0, left_s):.0f} s of {budget_s:g} s were left, it needs {case.least_s + _MARGIN_S:g} s"
        }
    found = in_a_process(case, min(left_s, case.limit_s))
    if flops := found.get("flops_per_image"):
        peak = roofline.get("matrix_product_flops_per_s", {}).get(case.precision)
        ours = found.get("images_per_s", {}).get("ours")
        found["share_of_matrix_product"] = ours and peak and flops * ours / peak
        of_copy = roofline.get("copy", {}).get("dram_active")
        active = found.get("device", {}).get("dram_active")
        found["share_of_copy"] = active and of_copy and active / of_copy
    return found


def measured_before(case: Case, card: str, runs: list[dict[str, Any]]) -> str | None:
    """Return when the run began that has the case from the same card, or None."""
    for run in runs:
        alike = run["dry_run"] == case.dry_run and card_of(run) == card
        if alike and run["cases"].get(case.name, {}).get("outcome") == "ok":
            return str(run["began_at"])
    return None


def card_of(run: dict[str, Any]) -> str | None:
    """Return which device a run was on, as far as it came to know."""
    card = run["cases"].get("roofline", {}).get("machine", {}).get("device")
    return None if card is None else str(card)


def in_a_process(case: Case, limit_s: float) -> dict[str, Any]:
    """Return what a case's own process has told last, and how it ended."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="scalestudy-gpu-") as name:
        told, log = Path(name, "told"), Path(name, "log")
        environ = os.environ | {"TMPDIR": name, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONUNBUFFERED": "1"}
        stops_s = repr(began_s + limit_s - _MARGIN_S)
        argv = [sys.executable, str(HERE / "gpu_case.py"), case.model_dump_json(), stops_s]
        with told.open("wb") as stdout, log.open("wb") as stderr:
            # Its stdin ends with this process, and it with its stdin.
            process = subprocess.Popen(
                argv, env=environ, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, start_new_session=True
            )
        with process:
            try:
                timed_out, _ = wait_for([process], limit_s, lambda: None)
            finally:
                kill_group(process)
        # A line that was cut off has no end.
        lines = told.read_text().split("\n")[:-1]
        said = log.read_text(errors="replace").split("\n")
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    found = {"outcome": "ok", **found, "took_s": round(time.monotonic() - began_s, 1)}
    if timed_out:
        found |= {"outcome": "stopped", "why": f"did not end within {limit_s:.0f} s", "log": said[-15:]}
    elif process.returncode:
        why = next((line for line in reversed(said) if line.strip()), f"exit code {process.returncode}")
        found |= {"outcome": "failed", "why": why, "log": said[-15:]}
    return found


def write(out: Path, runs: list[dict[str, Any]]) -> None:
    """Write all runs, whole or not at all."""
    write_atomically(out, json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
