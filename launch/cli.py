"""The command line. Nothing heavy is imported before the command that needs it."""

import io
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

    from scalestudy.launch.folder import StudyFolder
    from scalestudy.launch.launcher import Launcher
    from scalestudy.launch.runner import Origin
    from scalestudy.launch.study import Layout, Repeats, Study
    from scalestudy.trainers.trial import Trial

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How many GPUs should this training job use, where does its scaling break, which framework is faster here?",
)


def _home(path: Path | None) -> Path | None:
    """Expand `~`, which a shell leaves alone in --out=~/x and in quotes; every path of the command line comes by."""
    from scalestudy.launch.errors import InputError

    if path is None:
        return None
    try:
        # What is written there, tables, records and pages, names it in UTF-8.
        str(path).encode()
        return path.expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such user's home") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}: is a name that is not UTF-8; rename it, or set a UTF-8 locale") from None


StudyFile = Annotated[
    Path, typer.Argument(metavar="STUDY.yaml", help="The study file.", show_default=False, callback=_home)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Where records go; a run there goes on where the last one stopped.", callback=_home),
]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A study's output folder.", callback=_home)]


def main() -> None:
    """Run a command; whatever the user can mend ends in one line and exit code 2."""
    from scalestudy.launch.errors import InputError

    for stream in (sys.stdout, sys.stderr):
        # A console that has no × shows \\xd7. Who asked for something else by PYTHONIOENCODING gets that.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (InputError, OSError) as error:
        lines = str(error).split("\n")
        print("scalestudy: " + "\n".join(map(_printable, lines)), file=sys.stderr)
        sys.exit(2)


@app.command()
def run(
    study_file: StudyFile,
    launcher: Annotated[str | None, typer.Option(help="Who starts the ranks; the study's own if left out.")] = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long; run nothing.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="Only the trials on so many nodes; no report.")] = None,
    repeat: Annotated[int | None, typer.Option(min=1, help="Only this repeat, counted from 1; no report.")] = None,
) -> None:
    """Run the trials of a study that have no record yet, and write the report.

    Exit code 0: all ok; 1: some trial failed; 2: bad input; 130: stopped.
    """
    from scalestudy.launch.errors import InputError
    from scalestudy.launch.launcher import check_capacity, nodes_needed
    from scalestudy.launch.launchers import make_launcher
    from scalestudy.launch.runner import Origin, pending
    from scalestudy.launch.study import load_study, resolve, study_trials
    from scalestudy.launch.yaml_file import read_text

    study, text = load_study(study_file), read_text(study_file)
    chosen = make_launcher(launcher or study.launcher, study, study_file)
    topology = chosen.capacity()
    layout = resolve(study, study_file, topology)
    folder = _folder(out, study)
    console = _console()
    if study.adaptive and repeat:
        raise InputError(f"--repeat: {study_file}: repeats: which of them run is decided on the way; leave it out")
    # What it takes to describe this host and this code is not for a dry run.
    origin = None if dry_run else Origin.of(study.name, text, study.costs)
    if study.searches_batch and origin and not (nodes or repeat):
        study = _settle_batches(console, study, study_file, layout, folder, chosen, origin)
    trials = [
        trial
        for trial in study_trials(study, study_file, layout)
        if nodes in (None, nodes_needed(trial)) and repeat in (None, trial.repeat + 1)
    ]
    if not chosen.elastic:
        check_capacity(trials, study_file, chosen.name, topology)
    if origin is None:
        _list_points(trials, folder)
        return
    _create(console, folder, study.name)
    share = f"nodes-{nodes or 'any'}-repeat-{repeat or 'any'}" if nodes or repeat else None
    command = f"run {study_file} --launcher {chosen.name}"

    def left() -> int:
        return len(pending(trials, folder))

    with folder.locked(share), _stoppable(console, command, folder.path, chosen, left) as left_at_first:
        waiting = _run_pending(console, origin, trials, folder, chosen, study.adaptive)
        if share is None:
            _write_report(console, folder)
        if waiting:
            # A job that goes back to the queue starts when there are enough nodes again.
            _ignore_stops()
            how = chosen.resume(advanced=left() < left_at_first)
            _say(
                console,
                f"{len(waiting)} of the trials wait for more nodes than are left; "
                f"{how or 'run the study again when they are back'}",
            )
    undone = [trial for trial in pending(trials, folder, study.adaptive) if folder.record(trial) is None]
    records = filter(None, map(folder.record, trials))
    if undone or any(record.outcome not in ("ok", "skipped") for record in records):
        raise typer.Exit(1)


@app.command()
def collectives(
    study_file: StudyFile,
    launcher: Annotated[str | None, typer.Option(help="Who starts the ranks; the study's own if left out.")] = None,
    out: Out = None,
    smallest: Annotated[str, typer.Option(help="The smallest message; each is twice the one before.")] = "1KB",
    largest: Annotated[str, typer.Option(help="The largest message.")] = "1GB",
) -> None:
    """Time every trainer's own all-reduce over message sizes, at every world size of a study: what the network gives.

    Every sum is checked. Exit code 0: all ok; 1: some sweep failed; 2: bad input; 130: stopped.
    """
    from scalestudy.analysis import collectives as analysis
    from scalestudy.launch.collectives import parse_bytes, sweep_trials
    from scalestudy.launch.errors import InputError
    from scalestudy.launch.launcher import check_capacity
    from scalestudy.launch.launchers import make_launcher
    from scalestudy.launch.runner import Origin, pending
    from scalestudy.launch.study import load_study, resolve
    from scalestudy.launch.yaml_file import read_text
    from scalestudy.trainers.trial import Sweep

    plan = Sweep(smallest_bytes=parse_bytes("--smallest", smallest), largest_bytes=parse_bytes("--largest", largest))
    if plan.smallest_bytes > plan.largest_bytes:
        raise InputError(f"--smallest: {smallest!r} is above --largest {largest!r}")
    study, text = load_study(study_file), read_text(study_file)
    chosen = make_launcher(launcher or study.launcher, study, study_file)
    topology = chosen.capacity()
    trials = sweep_trials(study, study_file, resolve(study, study_file, topology), plan)
    if not chosen.elastic:
        check_capacity(trials, study_file, chosen.name, topology)
    console = _console()
    folder = _folder(out, study)
    _create(console, folder, study.name)
    sweeps = folder.collectives()
    command = f"collectives {study_file} --launcher {chosen.name}"
    with (
        folder.locked(),
        _stoppable(console, command, folder.path, chosen, lambda: len(pending(trials, sweeps))),
    ):
        _run_pending(console, Origin.of(study.name, text, study.costs), trials, sweeps, chosen, None)
        written = analysis.write(folder.path)
        if len(written.fits):
            _print_fits(console, written.fits)
        for damaged in written.damaged:
            _say(console, f"{damaged}; left out")
        _say(console, f"plot: {written.figure}" if written.figure else "no sweep ended ok: there is nothing to plot")
        if folder.outcomes():
            _write_report(console, folder)
    if any(record is None or record.outcome not in ("ok", "skipped") for record in map(sweeps.record, trials)):
        raise typer.Exit(1)


@app.command()
def submit(
    study_file: StudyFile,
    launcher: Annotated[str | None, typer.Option(help="slurm or ray; the study's own if left out.")] = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the jobs; submit nothing.")] = False,
    address: Annotated[str | None, typer.Option(help="Ray's dashboard, http://127.0.0.1:8265 if left out.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ray: neither follow the job nor fetch results.")] = False,
) -> None:
    """Submit a study: to Slurm a job for each node count and a report job after them; to Ray one job, followed.

    Submits what is missing: neither trials that have a record, nor what is in a job that is still there.
    """
    from scalestudy.launch.errors import InputError
    from scalestudy.launch.jobs import damaged_jobs
    from scalestudy.launch.study import load_study

    study = load_study(study_file)
    folder = _folder(out, study)
    console = _console()
    if folder.path.exists():
        _existing(console, folder.path)
    for damaged in [*folder.damaged(), *damaged_jobs(folder)]:
        _say(console, str(damaged))
    chosen = launcher or (study.launcher if study.launcher != "local" else "slurm")
    if chosen == "slurm":
        _submit_to_slurm(console, study, study_file, folder, dry_run)
    elif chosen == "ray":
        _submit_to_ray(console, study, study_file, folder, dry_run, address, no_wait)
    else:
        raise InputError(f"--launcher: {chosen!r} takes no jobs; known: slurm, ray")


@app.command()
def fetch(out: OutFolder) -> None:
    """Bring the records of a study home that was submitted to Ray."""
    from scalestudy.launch.errors import InputError
    from scalestudy.launch.jobs import damaged_jobs, submitted

    console = _console()
    folder = _existing(console, out)
    for damaged in damaged_jobs(folder):
        _say(console, damaged)
    jobs = submitted(folder, "ray")
    if not jobs:
        raise InputError(f"{out}: no job of Ray was submitted from there; see scalestudy submit --launcher ray")
    _say(console, f"{_ray_jobs().fetch(jobs[-1], folder)} trials new in {out}")
    for error in folder.damaged():
        _say(console, str(error))


@app.command()
def status(out: OutFolder) -> None:
    """Show the jobs that were submitted for a study, their state in the queue, and what is done."""
    from rich.markup import escape
    from rich.table import Table

    from scalestudy.launch import slurm_jobs
    from scalestudy.launch.jobs import damaged_jobs, submitted

    console = _console()
    folder = _existing(console, out)
    rows = slurm_jobs.status(folder)
    if submitted(folder, "ray"):
        rows += _ray_jobs().status(folder)
    if rows:
        table = Table("job", "what", "state", "time", "done", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    counts = [f"{count} {outcome}" for outcome, count in sorted(folder.outcomes().items())]
    damaged = folder.damaged()
    if damaged:
        counts.append(f"{len(damaged)} that cannot be read")
    _say(console, f"records in {folder.path}: {', '.join(counts) or 'none'}")
    for problem in [*damaged, *damaged_jobs(folder)]:
        _say(console, str(problem))


@app.command()
def report(
    out: OutFolder,
    price_per_device_hour: Annotated[
        float | None,
        typer.Option(help="Instead of the study's costs.price_per_device_hour.", min=0, show_default=False),
    ] = None,
    carbon_g_per_kwh: Annotated[
        float | None, typer.Option(help="Instead of the study's costs.carbon_g_per_kwh.", min=0, show_default=False)
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Write the plots as PNG too, not as SVG alone.")] = False,
) -> None:
    """Write tables, plots, report.html, results.parquet and results.csv from a study's records."""
    prices = {"price_per_device_hour": price_per_device_hour, "carbon_g_per_kwh": carbon_g_per_kwh}
    given = {name: value for name, value in prices.items() if value is not None}
    console = _console()
    _write_report(console, _existing(console, out), given, png=png)


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The output folder to compare with.", callback=_home)],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The output folder of what has changed.", callback=_home)],
    tolerance: Annotated[str, typer.Option(help="How much slower is not yet a regression, such as 3%.")] = "3%",
    base_again: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", help="The base measured on another day; may be given several times.", show_default=False
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="BASE and NEW are study files: run both in turns, then compare.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="With --again: where both records go, results/again if left out.", callback=_home),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the comparison as one page, too.", show_default=False, callback=_home)
    ] = None,
) -> None:
    """Say in Markdown what got faster or slower between two results, what differs between their environments first.

    Exit code 0: no point lost more than the tolerance; 1: one did, fails more often, or is missing; 3: that cannot be
    told, for too few repeats or too much noise; 2: bad input.
    """
    from scalestudy.analysis import compare as comparing
    from scalestudy.launch.errors import InputError
    from scalestudy.launch.study import percentage

    try:
        share = percentage(tolerance)
    except ValueError as error:
        raise InputError(f"--tolerance: {error}") from None
    if share >= 1:
        raise InputError(f"--tolerance: {tolerance!r} is not below 100%")
    if out and not again:
        raise InputError("--out: is for --again alone; BASE and NEW are the folders to compare")
    if again:
        base, new = _run_in_turns(base, new, out or Path("results") / "again")
    days = [path for path in map(_home, base_again or ()) if path]
    resolved = [path.resolve() for path in (base, new, *days)]
    if twice := next((path for path in days if resolved.count(path.resolve()) > 1), None):
        raise InputError(f"--base-again: {twice}: is given twice; it must be the base measured on another day")
    if resolved[0] == resolved[1]:
        raise InputError(f"NEW: {new}: is given twice; it must be another folder than BASE")
    for folder in (base, new, *days):
        # On stderr: stdout is the Markdown.
        _existing(_console(stderr=True), folder)
    try:
        found = comparing.compare(base, new, share, days)
    except ValueError as error:
        raise InputError(str(error)) from None
    print(comparing.markdown(found), end="")
    if html:
        html.write_text(comparing.html(found), encoding="utf-8")
    if code := 1 if found.regressed else 3 if found.unclear else 0:
        raise typer.Exit(code)


@app.command()
def doctor(
    study_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STUDY.yaml]", help="Look into the environments that it names.", show_default=False, callback=_home
        ),
    ] = None,
) -> None:
    """Say what this machine has, what is missing for which trainer or launcher, and how to get it."""
    from rich.markup import escape
    from rich.table import Table

    from scalestudy.launch.doctor import findings
    from scalestudy.launch.launchers import all_programs
    from scalestudy.launch.study import load_study

    programs = all_programs(load_study(study_file), study_file) if study_file else {}
    table = Table("", "what", "found", "to get it", box=None, pad_edge=False)
    for finding in findings(programs):
        table.add_row(
            {True: "[green]yes[/]", False: "[yellow]no[/]", None: "?"}[finding.ready],
            f"{finding.group} {finding.subject}",
            escape(finding.detail),
            escape(finding.advice),
        )
    _console().print(table)


def _folder(out: Path | None, study: "Study") -> "StudyFolder":
    from scalestudy.launch.folder import StudyFolder

    return StudyFolder(out or Path("results") / study.name)


def _existing(console: "Console", out: Path) -> "StudyFolder":
    """Return a folder to read from; raises InputError where there is none, or one of another version."""
    from scalestudy.launch.folder import StudyFolder

    folder = StudyFolder(out)
    if problem := folder.check():
        _say(console, problem)
    return folder


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    # Paths and names are no markup of numbers, and `:warning:` in one of them is no picture.
    return Console(highlight=False, emoji=False, stderr=stderr)


def _say(console: "Console", text: str) -> None:
    """Print a line as it is: what a user has named `[bold]` is no markup."""
    console.print(_printable(text), soft_wrap=True, markup=False)


def _printable(line: str) -> str:
    """Return a line in which no name of a file or study moves the cursor, or breaks the line."""
    return line if line.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def _create(console: "Console", folder: "StudyFolder", study_name: str) -> None:
    """Make a study's folder, and say once what its file system cannot do."""
    folder.create(study_name)
    if unsafe := folder.unsafe():
        console.print(unsafe, soft_wrap=True, highlight=False, markup=False)


def _print_fits(console: "Console", fits: "DataFrame") -> None:
    from rich.markup import escape
    from rich.table import Table

    from scalestudy.analysis.shares import NOT_SHOWN, off_by

    table = Table("devices", "trainer", "latency", "bandwidth", "best bus bandwidth", "fit", box=None, pad_edge=False)
    for row in fits.itertuples():
        table.add_row(
            str(row.world_size),
            escape(row.series),
            f"{1e6 * row.latency_s:,.0f} µs" if row.latency_s > 0 else NOT_SHOWN,
            f"{row.bandwidth_bytes_per_s / 1e9:.3g} GB/s" if row.bandwidth_bytes_per_s > 0 else NOT_SHOWN,
            f"{row.best_bus_bytes_per_s / 1e9:.3g} GB/s at {row.best_size}",
            f"off by {off_by(row.rms_residual)}",
        )
    console.print(table)


def _settle_batches(
    console: "Console",
    study: "Study",
    study_file: Path,
    layout: "Layout",
    folder: "StudyFolder",
    launcher: "Launcher",
    origin: "Origin",
) -> "Study":
    """Find what `batch: auto` stands for, and say so."""
    from scalestudy.launch.batch_search import Tries, settle_batches
    from scalestudy.launch.progress import TriedLines

    folder.create(study.name)
    with folder.locked():
        tries = Tries(folder.tries(), launcher, origin, TriedLines(console))
        settled = settle_batches(study, study_file, layout, tries)
    for asked, found in zip(study.models, settled.models, strict=True):
        if isinstance(found.batch, tuple) and asked != found:
            _say(console, f"{found.name}: batch auto is {found.batch[0]} images a device")
    return settled


def _run_pending(
    console: "Console",
    origin: "Origin",
    trials: "list[Trial]",
    folder: "StudyFolder",
    launcher: "Launcher",
    adaptive: "Repeats | None",
) -> "list[Trial]":
    """Run what has no record and return the trials for which too few nodes were left.

    Adaptive repeats are added round by round, until every point's interval is narrow enough or has all it may get.
    """
    from scalestudy.launch.runner import pending

    tried: set[str] = set()
    waiting: list[Trial] = []
    while not waiting:
        todo = pending(trials, folder, adaptive)
        # What a lost node left to be run again has had its turns.
        if tried and {trial.id for trial in todo} <= tried:
            break
        waiting = _run_round(console, origin, trials, todo, folder, launcher, adaptive)
        if adaptive is None:
            break
        tried |= {trial.id for trial in todo}
    return waiting


def _run_round(
    console: "Console",
    origin: "Origin",
    trials: "list[Trial]",
    todo: "list[Trial]",
    folder: "StudyFolder",
    launcher: "Launcher",
    adaptive: "Repeats | None",
) -> "list[Trial]":
    from scalestudy.launch.progress import Estimate, LiveBar, PlainLines, duration
    from scalestudy.launch.runner import run_trials

    done = [record for trial in trials if (record := folder.record(trial))]
    for damaged in folder.damaged(trials):
        _say(console, f"{damaged}; its folder is set aside and the trial runs again")
    estimate = Estimate(done)
    _say(
        console,
        f"{origin.study_name}: {len(trials)} trials{' at most' if adaptive else ''}, "
        f"{len(done)} done before, {len(todo)} to run, "
        f"about {duration(sum(map(estimate.seconds, todo)))}; records in {folder.path}",
    )
    if console.is_terminal and todo:
        with LiveBar(console, todo, estimate) as bar:
            return run_trials(todo, folder, launcher, origin, bar)
    return run_trials(todo, folder, launcher, origin, PlainLines(console, todo, estimate))


def _run_in_turns(base_file: Path, new_file: Path, out: Path) -> tuple[Path, Path]:
    """Run what is left of two studies on this host, repeat by repeat in turns; return both folders."""
    from scalestudy.launch.errors import InputError
    from scalestudy.launch.folder import StudyFolder
    from scalestudy.launch.launcher import check_capacity
    from scalestudy.launch.launchers import make_launcher
    from scalestudy.launch.progress import Estimate, PlainLines
    from scalestudy.launch.runner import Origin, Side, pending, run_in_turns
    from scalestudy.launch.study import load_study, resolve, study_trials
    from scalestudy.launch.yaml_file import environments_in, read_text
    from scalestudy.trainers.files import record_paths

    console = _console(stderr=True)
    sides = []
    repeats = None
    for name, study_file in (("base", base_file), ("new", new_file)):
        study = load_study(study_file)
        if study.launcher != "local":
            raise InputError(f"{study_file}: launcher: --again runs on this host alone, not by {study.launcher!r}")
        if study.adaptive:
            raise InputError(f"{study_file}: repeats: --again needs a number, the same for both")
        if repeats and study.repeats != repeats:
            raise InputError(
                f"{study_file}: repeats: {study.repeats}, but {base_file} has {repeats}; --again needs the same number "
                "for both"
            )
        repeats = study.repeats
        launcher = make_launcher(study.launcher, study, study_file)
        topology = launcher.capacity()
        trials = study_trials(study, study_file, resolve(study, study_file, topology))
        check_capacity(trials, study_file, launcher.name, topology)
        origin = Origin.of(study.name, read_text(study_file), study.costs)
        sides.append(Side(trials=trials, folder=StudyFolder(out / name), launcher=launcher, origin=origin))

    def left() -> "list[Trial]":
        return [trial for side in sides for trial in pending(side.trials, side.folder)]

    with ExitStack() as held:
        for side, study_file in zip(sides, (base_file, new_file), strict=True):
            _create(console, side.folder, side.origin.study_name)
            asked_for = {side.folder.trial_path(trial) for trial in side.trials}
            if others := [path for path in record_paths(side.folder.trials_path) if path.parent not in asked_for]:
                raise InputError(
                    f"{side.folder.path}: --out: holds {len(others)} record{'s' if len(others) > 1 else ''} of trials "
                    f"that {study_file} does not ask for; name another folder"
                )
            held.enter_context(side.folder.locked())
        command = f"compare --again {base_file} {new_file}"
        held.enter_context(_stoppable(console, command, out, sides[0].launcher, lambda: len(left())))
        done = []
        for side, study_file in zip(sides, (base_file, new_file), strict=True):
            own = [record for trial in side.trials if (record := side.folder.record(trial))]
            # Which interpreters is not part of a trial.
            asked = environments_in(side.origin.study_text)
            if any(environments_in(record.environment.study) != asked for record in own):
                raise InputError(
                    f"{side.folder.path}: --out: holds records of other environments than those of {study_file}; name "
                    "another folder"
                )
            done += own
        todo = left()
        _say(console, f"{sum(len(side.trials) for side in sides)} trials, {len(todo)} to run; records in {out}")
        if not todo:
            when = max(record.environment.started_at for record in done)
            _say(console, f"all was measured before, the last of it at {when}; to measure anew, name another --out")
        run_in_turns(sides, PlainLines(console, todo, Estimate(done)))
    return sides[0].folder.path, sides[1].folder.path


def _submit_to_slurm(
    console: "Console", study: "Study", study_file: Path, folder: "StudyFolder", dry_run: bool
) -> None:
    import os

    from scalestudy.launch import slurm_jobs

    plan = slurm_jobs.plan(study, study_file, folder, os.environ)
    if dry_run:
        console.print(slurm_jobs.described(plan, folder.path.resolve()), soft_wrap=True, markup=False)
        return
    _create(console, folder, study.name)
    made, alive = slurm_jobs.submit(plan, folder, os.environ)
    for job in alive:
        _say(console, f"job {job.id} ({_job_content(job.nodes)}) is still there")
    for job in made:
        _say(console, f"job {job.id} submitted: {_job_content(job.nodes)}")
    if made:
        _say(console, f"how they are: scalestudy status {folder.path}")
    elif not alive:
        _say(console, f"nothing is missing: all {len(plan.trials)} trials have a record in {folder.path}")


def _submit_to_ray(
    console: "Console",
    study: "Study",
    study_file: Path,
    folder: "StudyFolder",
    dry_run: bool,
    address: str | None,
    no_wait: bool,
) -> None:
    import json

    ray_jobs = _ray_jobs()
    if dry_run:
        console.print(json.dumps(ray_jobs.job(study, study_file, folder), indent=2), soft_wrap=True, markup=False)
        return
    _create(console, folder, study.name)
    made, new = ray_jobs.submit(study, study_file, folder, address)
    _say(console, f"job {made.id} {'submitted' if new else 'is still there'}: {study.name}, records in {made.results}")
    if no_wait:
        _say(console, f"how it is: scalestudy status {folder.path}; its results: scalestudy fetch {folder.path}")
        return
    ended_well = ray_jobs.follow(made, lambda text: console.print(text, end="", soft_wrap=True, markup=False))
    _say(console, f"{ray_jobs.fetch(made, folder)} trials new in {folder.path}")
    if not ended_well:
        raise typer.Exit(1)


def _ray_jobs() -> ModuleType:
    """Return what is asked of Ray, which takes a second to import, and is an extra."""
    from scalestudy.launch.errors import InputError

    try:
        from scalestudy.launch import ray_jobs
    except ModuleNotFoundError:
        raise InputError("ray: is not installed here: pip install 'scalestudy[ray]'") from None
    return ray_jobs


def _job_content(nodes: int | None) -> str:
    return "the report" if nodes is None else f"trials on {nodes} node{'s' if nodes > 1 else ''}"


def _list_points(trials: "list[Trial]", folder: "StudyFolder") -> None:
    """Say what a run would do, a line a point of the study: its repeats are many, and alike."""
    from scalestudy.launch.progress import Estimate, described, duration
    from scalestudy.trainers.trainer import series_name

    records = {trial: folder.record(trial) for trial in trials} if folder.trials_path.is_dir() else {}
    estimate = Estimate([record for record in records.values() if record])
    by_point: dict[Trial, list[Trial]] = {}
    for trial in trials:
        by_point.setdefault(trial.model_copy(update={"repeat": 0}), []).append(trial)
    lines = []
    for point in sorted(by_point, key=lambda point: (point.model, point.world_size, series_name(point))):
        repeats = by_point[point]
        ended = Counter(record.outcome for record in map(records.get, repeats) if record)
        done = "".join(f", {count} {outcome}" for outcome, count in sorted(ended.items()))
        which = described(repeats[0], repeats[-1].repeat)
        each = f"about {duration(estimate.seconds(point))} each"
        lines.append(f"{which} · {point.per_device_batch} images a device: {len(repeats)} trials{done}, {each}")
    todo = [trial for trial in trials if records.get(trial) is None]
    lines.append(f"{len(trials)} trials, {len(todo)} to run, about {duration(sum(map(estimate.seconds, todo)))}")
    if records:
        lines += [f"{damaged}; a run sets its folder aside" for damaged in folder.damaged(trials)]
    print("\n".join(map(_printable, lines)))


def _write_report(
    console: "Console", folder: "StudyFolder", prices: Mapping[str, float] | None = None, *, png: bool = False
) -> None:
    from scalestudy.analysis.report import write_report
    from scalestudy.launch.errors import InputError

    try:
        written = write_report(folder.path, prices, png=png)
    except ValueError as error:
        raise InputError(str(error)) from None
    for damaged in written.damaged:
        _say(console, f"{damaged}; left out, run the study again to measure it anew")
    for sentence in written.left_out:
        _say(console, sentence)
    _say(console, f"report: {written.html}")


_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _ignore_stops() -> None:
    """From now on nothing stops this run: it is ending, and what it asks of a scheduler may send it a signal."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _stoppable(
    console: "Console", command: str, out: Path, launcher: "Launcher", left: Callable[[], int]
) -> Iterator[int]:
    """End on Ctrl-C, SIGTERM and Slurm's notice before a time limit: ranks stopped, the way to go on told.

    `left` counts the trials that are to be run. Yields how many they are.
    """

    def stop(*_: object) -> NoReturn:
        # Once: the stop itself must not be stopped.
        _ignore_stops()
        raise KeyboardInterrupt

    for number in _STOPS:
        signal.signal(number, stop)
    left_at_first = left()
    try:
        yield left_at_first
    except KeyboardInterrupt:
        _ignore_stops()
        how = launcher.resume(advanced=left() < left_at_first)
        _say(console, f"stopped; the ranks are gone and {out} is whole. {how or 'To go on:'}")
        if not how:
            _say(console, f"  scalestudy {command} --out {out}")
        raise typer.Exit(130) from None
