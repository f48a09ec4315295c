"""The command line. Nothing heavy is imported before the command that needs it."""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Where records go; a run there goes on where the last one stopped."),
]


def main() -> None:
    """Run a command; whatever the user can mend ends in one line and exit code 2."""
    from scalestudy.launch.errors import InputError

    try:
        app()
    except (InputError, OSError) as error:
        print(f"scalestudy: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def run(
    study_file: StudyFile,
    launcher: Annotated[str | None, typer.Option(help="Who starts the ranks; the study's own if left out.")] = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trials and an estimate; run nothing.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="Only the trials on so many nodes; no report.")] = None,
    repeat: Annotated[int | None, typer.Option(min=1, help="Only this repeat, counted from 1; no report.")] = None,
) -> None:
    """Run the trials of a study that have no record yet, and write the report.

    Exit code 0: all ok; 1: some trial failed; 2: bad input; 130: stopped.
    """
    from rich.console import Console

    from scalestudy.launch.errors import InputError
    from scalestudy.launch.launcher import check_capacity, nodes_needed
    from scalestudy.launch.launchers import make_launcher
    from scalestudy.launch.runner import Origin, pending
    from scalestudy.launch.study import load_study, resolve, study_trials

    study, text = load_study(study_file), study_file.read_text()
    chosen = make_launcher(launcher or study.launcher, study, study_file)
    topology = chosen.capacity()
    layout = resolve(study, study_file, topology)
    folder = _folder(out, study)
    console = Console()
    origin = Origin.of(study.name, text, study.costs)
    if study.adaptive and repeat:
        raise InputError(f"--repeat: {study_file}: repeats: which of them run is decided on the way; leave it out")
    if study.searches_batch and not (dry_run or nodes or repeat):
        study = _settle_batches(console, study, study_file, layout, folder, chosen, origin)
    trials = [
        trial
        for trial in study_trials(study, study_file, layout)
        if nodes in (None, nodes_needed(trial)) and repeat in (None, trial.repeat + 1)
    ]
    if not chosen.elastic:
        check_capacity(trials, study_file, chosen.name, topology)
    if dry_run:
        _list_trials(console, trials, folder)
        return
    folder.create(study.name)
    share = f"nodes-{nodes or 'any'}-repeat-{repeat or 'any'}" if nodes or repeat else None
    with folder.locked(share), _stoppable(console, "run", study_file, trials, folder, chosen) as left_at_first:
        waiting = _run_pending(console, origin, trials, folder, chosen, study.adaptive)
        if share is None:
            _write_report(console, folder)
        if waiting:
            # A job that goes back to the queue starts when there are enough nodes again.
            _ignore_stops()
            how = chosen.resume(advanced=len(pending(trials, folder)) < left_at_first)
            console.print(
                f"{len(waiting)} of the trials wait for more nodes than are left; "
                f"{how or 'run the study again when they are back'}",
                soft_wrap=True,
                highlight=False,
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
    from rich.console import Console

    from scalestudy.analysis import collectives as analysis
    from scalestudy.launch.collectives import parse_bytes, sweep_trials
    from scalestudy.launch.errors import InputError
    from scalestudy.launch.launcher import check_capacity
    from scalestudy.launch.launchers import make_launcher
    from scalestudy.launch.runner import Origin
    from scalestudy.launch.study import load_study, resolve
    from scalestudy.trainers.trial import Sweep

    plan = Sweep(smallest_bytes=parse_bytes("--smallest", smallest), largest_bytes=parse_bytes("--largest", largest))
    if plan.smallest_bytes > plan.largest_bytes:
        raise InputError(f"--smallest: {smallest!r} is above --largest {largest!r}")
    study = load_study(study_file)
    chosen = make_launcher(launcher or study.launcher, study, study_file)
    topology = chosen.capacity()
    trials = sweep_trials(study, study_file, resolve(study, study_file, topology), plan)
    if not chosen.elastic:
        check_capacity(trials, study_file, chosen.name, topology)
    console = Console()
    folder = _folder(out, study)
    folder.create(study.name)
    sweeps = folder.collectives()
    with folder.locked(), _stoppable(console, "collectives", study_file, trials, sweeps, chosen):
        _run_pending(console, Origin.of(study.name, study_file.read_text(), study.costs), trials, sweeps, chosen, None)
        written = analysis.write(folder.path)
        if len(written.fits):
            _print_fits(console, written.fits)
        console.print(f"plot: {written.figure}", soft_wrap=True, highlight=False)
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
    from rich.console import Console

    from scalestudy.launch.errors import InputError
    from scalestudy.launch.folder import StudyFolder
    from scalestudy.launch.study import load_study

    study = load_study(study_file)
    folder = StudyFolder(out or Path("results") / study.name)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    chosen = launcher or (study.launcher if study.launcher != "local" else "slurm")
    if chosen == "slurm":
        _submit_to_slurm(console, study, study_file, folder, dry_run)
    elif chosen == "ray":
        _submit_to_ray(console, study, study_file, folder, dry_run, address, no_wait)
    else:
        raise InputError(f"--launcher: {chosen!r} takes no jobs; known: slurm, ray")


@app.command()
def fetch(out: Annotated[Path, typer.Argument(metavar="OUT", help="A study's output folder.")]) -> None:
    """Bring the records of a study home that was submitted to Ray."""
    from rich.console import Console

    from scalestudy.launch import ray_jobs
    from scalestudy.launch.folder import StudyFolder

    new = ray_jobs.fetch(StudyFolder(out))
    Console(soft_wrap=True, highlight=False).print(f"{new} trials new in {out}")


@app.command()
def status(out: Annotated[Path, typer.Argument(metavar="OUT", help="A study's output folder.")]) -> None:
    """Show the jobs that were submitted for a study, their state in the queue, and what is done."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from scalestudy.launch import slurm_jobs
    from scalestudy.launch.folder import StudyFolder
    from scalestudy.launch.jobs import submitted

    folder = StudyFolder(out)
    rows = slurm_jobs.status(folder)
    if submitted(folder, "ray"):
        from scalestudy.launch import ray_jobs

        rows += ray_jobs.status(folder)
    console = Console(highlight=False)
    if rows:
        table = Table("job", "what", "state", "time", "done", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(folder.outcomes().items()))
    console.print(f"records in {folder.path}: {counts or 'none'}", soft_wrap=True)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A study's output folder.")],
    price_per_device_hour: Annotated[
        float | None,
        typer.Option(help="Instead of the study's costs.price_per_device_hour.", min=0, show_default=False),
    ] = None,
    carbon_g_per_kwh: Annotated[
        float | None, typer.Option(help="Instead of the study's costs.carbon_g_per_kwh.", min=0, show_default=False)
    ] = None,
) -> None:
    """Write tables, plots, report.html, results.parquet and results.csv from a study's records."""
    from rich.console import Console

    from scalestudy.launch.folder import StudyFolder

    prices = {"price_per_device_hour": price_per_device_hour, "carbon_g_per_kwh": carbon_g_per_kwh}
    given = {name: value for name, value in prices.items() if value is not None}
    _write_report(Console(), StudyFolder(out), given)


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The output folder to compare with.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The output folder of what has changed.")],
    tolerance: Annotated[str, typer.Option(help="How much slower is not yet a regression, such as 3%.")] = "0%",
    html: Annotated[
        Path | None, typer.Option(help="Write the comparison as one page, too.", show_default=False)
    ] = None,
) -> None:
    """Say in Markdown what got faster or slower between two results, what differs between their environments first.

    Exit code 0: nothing is shown to be slower past the tolerance; 1: something is, or failed; 2: bad input.
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
    try:
        found = comparing.compare(base, new, share)
    except ValueError as error:
        raise InputError(str(error)) from None
    print(comparing.markdown(found), end="")
    if html:
        html.write_text(comparing.html(found))
    if found.regressed:
        raise typer.Exit(1)


@app.command()
def doctor(
    study_file: Annotated[
        Path | None,
        typer.Argument(metavar="[STUDY.yaml]", help="Look into the environments that it names.", show_default=False),
    ] = None,
) -> None:
    """Say what this machine has, what is missing for which trainer or launcher, and how to get it."""
    from rich.console import Console
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
    Console().print(table)


def _folder(out: Path | None, study: "Study") -> "StudyFolder":
    from scalestudy.launch.folder import StudyFolder

    return StudyFolder(out.expanduser() if out else Path("results") / study.name)


def _print_fits(console: "Console", fits: "DataFrame") -> None:
    from rich.table import Table

    table = Table("devices", "trainer", "latency", "bandwidth", "best bus bandwidth", "fit", box=None, pad_edge=False)
    for row in fits.itertuples():
        table.add_row(
            str(row.world_size),
            row.series,
            f"{1e6 * row.latency_s:,.0f} µs",
            f"{row.bandwidth_bytes_per_s / 1e9:.3g} GB/s",
            f"{row.best_bus_bytes_per_s / 1e9:.3g} GB/s at {row.best_size}",
            f"off by {row.rms_residual:.0%}",
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
            console.print(f"{found.name}: batch auto is {found.batch[0]} images a device", highlight=False)
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
        console.print(f"{damaged}: is damaged; its folder is set aside and the trial runs again", soft_wrap=True)
    estimate = Estimate(done)
    console.print(
        f"{origin.study_name}: {len(trials)} trials{' at most' if adaptive else ''}, "
        f"{len(done)} done before, {len(todo)} to run, "
        f"about {duration(sum(map(estimate.seconds, todo)))}; records in {folder.path}",
        soft_wrap=True,
        highlight=False,
    )
    if console.is_terminal and todo:
        with LiveBar(console, todo, estimate) as bar:
            return run_trials(todo, folder, launcher, origin, bar)
    return run_trials(todo, folder, launcher, origin, PlainLines(console, todo, estimate))


def _submit_to_slurm(
    console: "Console", study: "Study", study_file: Path, folder: "StudyFolder", dry_run: bool
) -> None:
    import os

    from scalestudy.launch import slurm_jobs

    plan = slurm_jobs.plan(study, study_file, folder, os.environ)
    if dry_run:
        console.print(slurm_jobs.described(plan, folder.path.resolve()))
        return
    folder.create(study.name)
    made, alive = slurm_jobs.submit(plan, folder, os.environ)
    for job in alive:
        console.print(f"job {job.id} ({_job_content(job.nodes)}) is still there")
    for job in made:
        console.print(f"job {job.id} submitted: {_job_content(job.nodes)}")
    if made:
        console.print(f"how they are: scalestudy status {folder.path}")
    elif not alive:
        console.print(f"nothing is missing: all {len(plan.trials)} trials have a record in {folder.path}")


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

    from scalestudy.launch import ray_jobs

    if dry_run:
        console.print(json.dumps(ray_jobs.job(study, study_file, folder), indent=2))
        return
    folder.create(study.name)
    made, new = ray_jobs.submit(study, study_file, folder, address)
    console.print(f"job {made.id} {'submitted' if new else 'is still there'}: {study.name}, records in {made.results}")
    if no_wait:
        console.print(f"how it is: scalestudy status {folder.path}; its results: scalestudy fetch {folder.path}")
        return
    ended_well = ray_jobs.follow(made, lambda text: console.print(text, end=""))
    console.print(f"{ray_jobs.fetch(folder)} trials new in {folder.path}")
    if not ended_well:
        raise typer.Exit(1)


def _job_content(nodes: int | None) -> str:
    return "the report" if nodes is None else f"trials on {nodes} node{'s' if nodes > 1 else ''}"


def _list_trials(console: "Console", trials: "list[Trial]", folder: "StudyFolder") -> None:
    from scalestudy.launch.progress import Estimate, described, duration

    records = {trial: folder.record(trial) for trial in trials}
    estimate = Estimate([record for record in records.values() if record])
    for trial, record in records.items():
        state = f"done: {record.outcome}" if record else f"about {duration(estimate.seconds(trial))}"
        console.print(f"{trial.id}  {described(trial)}  {state}", highlight=False, soft_wrap=True)
    todo = [trial for trial, record in records.items() if record is None]
    total_s = sum(map(estimate.seconds, todo))
    console.print(f"{len(trials)} trials, {len(todo)} to run, about {duration(total_s)}", highlight=False)


def _write_report(console: "Console", folder: "StudyFolder", prices: Mapping[str, float] | None = None) -> None:
    from scalestudy.analysis.report import write_report
    from scalestudy.launch.errors import InputError

    try:
        written = write_report(folder.path, prices)
    except ValueError as error:
        raise InputError(str(error)) from None
    for damaged in written.damaged:
        console.print(f"{damaged}: is damaged and left out; run the study again to measure it anew", soft_wrap=True)
    console.print(f"report: {written.html}", soft_wrap=True, highlight=False)


_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _ignore_stops() -> None:
    """From now on nothing stops this run: it is ending, and what it asks of a scheduler may send it a signal."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _stoppable(
    console: "Console",
    command: str,
    study_file: Path,
    trials: "list[Trial]",
    folder: "StudyFolder",
    launcher: "Launcher",
) -> Iterator[int]:
    """End on Ctrl-C, SIGTERM and Slurm's notice before a time limit: ranks stopped, the way to go on told.

    Yields how many trials there are to be run.
    """
    from scalestudy.launch.runner import pending

    def stop(*_: object) -> NoReturn:
        # Once: the stop itself must not be stopped.
        _ignore_stops()
        raise KeyboardInterrupt

    for number in _STOPS:
        signal.signal(number, stop)
    left_at_first = len(pending(trials, folder))
    try:
        yield left_at_first
    except KeyboardInterrupt:
        _ignore_stops()
        how = launcher.resume(advanced=len(pending(trials, folder)) < left_at_first)
        console.print(
            f"stopped; the ranks are gone and {folder.path} is whole. "
            + (how or f"To go on:\n  scalestudy {command} {study_file} --launcher {launcher.name} --out {folder.path}"),
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(130) from None
