"""The command line. Nothing heavy is imported before the command that needs it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from scalestudy.launch.folder import StudyFolder
    from scalestudy.launch.launcher import Launcher
    from scalestudy.launch.study import Study
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
) -> None:
    """Run the trials of a study that have no record yet, and write the report.

    Exit code 0: all ok; 1: some trial failed; 2: bad input; 130: stopped.
    """
    from rich.console import Console

    from scalestudy.launch.folder import StudyFolder
    from scalestudy.launch.launchers import make_launcher
    from scalestudy.launch.study import load_study, resolve_device, study_trials

    study = load_study(study_file)
    device = resolve_device(study, study_file)
    chosen = make_launcher(launcher or study.launcher, study, study_file, device)
    trials = study_trials(study, study_file, chosen.capacity(), device)
    folder = StudyFolder(out or Path("results") / study.name)
    console = Console()
    if dry_run:
        _list_trials(console, trials, folder)
        return
    folder.create(study.name)
    with folder.locked(), _stoppable(console, study_file, folder):
        failed = _run_pending(console, study, study_file, trials, folder, chosen)
    _write_report(console, folder)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(out: Annotated[Path, typer.Argument(metavar="OUT", help="A study's output folder.")]) -> None:
    """Write tables, plots, report.html, results.parquet and results.csv from a study's records."""
    from rich.console import Console

    from scalestudy.launch.folder import StudyFolder

    _write_report(Console(), StudyFolder(out))


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing for which trainer or launcher, and how to get it."""
    from rich.console import Console
    from rich.table import Table

    from scalestudy.launch.doctor import findings

    table = Table("", "what", "found", "to get it", box=None, pad_edge=False)
    for finding in findings():
        table.add_row(
            "[green]yes[/]" if finding.ready else "[yellow]no[/]",
            f"{finding.group} {finding.subject}",
            finding.detail,
            finding.advice,
        )
    Console().print(table)


def _run_pending(
    console: "Console",
    study: "Study",
    study_file: Path,
    trials: "list[Trial]",
    folder: "StudyFolder",
    launcher: "Launcher",
) -> int:
    """Run what has no record and return how many of the study's trials did not end ok."""
    from scalestudy.launch.progress import Estimate, LiveBar, PlainLines, duration
    from scalestudy.launch.runner import Origin, pending, run_trials

    todo = pending(trials, folder)
    done = [record for trial in trials if (record := folder.record(trial))]
    for damaged in folder.damaged(trials):
        console.print(f"{damaged}: is damaged; its folder is set aside and the trial runs again", soft_wrap=True)
    estimate = Estimate(done)
    console.print(
        f"{study.name}: {len(trials)} trials, {len(done)} done before, {len(todo)} to run, "
        f"about {duration(sum(map(estimate.seconds, todo)))}; records in {folder.path}",
        soft_wrap=True,
        highlight=False,
    )
    origin = Origin.of(study.name, study_file)
    if console.is_terminal and todo:
        with LiveBar(console, todo, estimate) as bar:
            run_trials(todo, folder, launcher, origin, bar)
    else:
        run_trials(todo, folder, launcher, origin, PlainLines(console, todo, estimate))
    return sum(record is None or record.outcome != "ok" for record in map(folder.record, trials))


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


def _write_report(console: "Console", folder: "StudyFolder") -> None:
    from scalestudy.analysis.report import write_report
    from scalestudy.launch.errors import InputError

    try:
        written = write_report(folder.path)
    except ValueError as error:
        raise InputError(str(error)) from None
    for damaged in written.damaged:
        console.print(f"{damaged}: is damaged and left out; run the study again to measure it anew", soft_wrap=True)
    console.print(f"report: {written.html}", soft_wrap=True, highlight=False)


@contextmanager
def _stoppable(console: "Console", study_file: Path, folder: "StudyFolder") -> Iterator[None]:
    """End on Ctrl-C and on SIGTERM alike: ranks stopped, the way to go on told."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        console.print(
            f"stopped; the ranks are gone and {folder.path} is whole. To go on:\n"
            f"  scalestudy run {study_file} --out {folder.path}",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
