"""The Ray launcher's and its jobs' pure parts; what needs a cluster is in tests/system/test_ray.py."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scalestudy.cluster.host import usable_cpus
from scalestudy.launch import ray_jobs
from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.jobs import Submitted, note, submitted
from scalestudy.launch.local import local_ranks
from scalestudy.launch.pack import packed, unpack
from scalestudy.launch.ray import Place, bundles, claim_cpus, gpus_of, ranks_of, usable_nodes
from scalestudy.launch.ray_jobs import job
from scalestudy.launch.study import Study
from scalestudy.trainers.record import Record
from scalestudy.trainers.trial import Trial

MakeTrial = Callable[..., Trial]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"world_size": 2, "devices_per_node": 8, "threads_per_device": 3}, [{"CPU": 6}]),
        ({"world_size": 3, "devices_per_node": 2, "device": "gpu"}, [{"CPU": 2, "GPU": 2}, {"CPU": 1, "GPU": 1}]),
        ({"world_size": 2, "devices_per_node": 1, "device": "gpu"}, [{"CPU": 1, "GPU": 1}] * 2),
        ({"trainer": "tf-mirrored", "world_size": 4, "device": "gpu"}, [{"CPU": 4, "GPU": 4}]),
    ],
)
def test_a_bundle_is_what_a_node_of_the_trial_must_have(
    make_trial: MakeTrial, changes: dict[str, object], expected: list[dict[str, float]]
) -> None:
    assert bundles(make_trial(**changes)) == expected


def test_ranks_claim_cpus_of_their_own_and_another_trial_finds_none_left(make_trial: MakeTrial, tmp_path: Path) -> None:
    count = len(usable_cpus())
    trial = make_trial(world_size=count, devices_per_node=count)
    claims = [claim_cpus(trial, rank, (), tmp_path) for rank in local_ranks(count)]
    assert sorted(cpu for claim in claims for cpu in claim.cpus) == usable_cpus()
    [alone] = local_ranks(1)
    assert claim_cpus(make_trial(), alone, (), tmp_path).cpus == tuple(usable_cpus())
    claims[-1].release()
    claims.append(claim_cpus(make_trial(), alone, (), tmp_path))
    assert claims[-1].cpus == claims[-2].cpus
    for claim in claims:
        claim.release()


def test_ranks_are_ordered_by_node_and_then_by_device() -> None:
    places = [Place(str(i // 2), f"host{i // 2}", "10.0.0.1", 20_000 + i, ()) for i in range(3)]
    found = [(r.rank, r.node_rank, r.local_rank, r.local_world_size, r.host) for r in ranks_of(places, per_node=2)]
    assert found == [(0, 0, 0, 2, "host0"), (1, 0, 1, 2, "host0"), (2, 1, 0, 1, "host1")]


def test_local_rank_0_has_the_first_gpu_whichever_actor_was_given_it() -> None:
    gpus = [("10",), ("9",), ("0",), ("1",)]
    places = [Place(str(i // 2), f"host{i // 2}", "10.0.0.1", 20_000 + i, gpus[i]) for i in range(4)]
    found = [gpus_of(places, rank) for rank in ranks_of(places, per_node=2)]
    assert found == [("9", "10"), ("9", "10"), ("0", "1"), ("0", "1")]


def test_a_job_takes_the_studys_folder_along_without_results_and_environments(tmp_path: Path) -> None:
    study = Study(name="s", trainers=("torch-ddp",), models=("cnn",), batch=8, world_sizes=(1,))
    asked = job(study, tmp_path / "my study.yaml", StudyFolder(tmp_path / "runs" / "s"))
    assert asked["entrypoint"].endswith(
        """exec "$python" -m scalestudy.launch run 'my study.yaml' --launcher ray --out '~/scalestudy/s'"""
    )
    assert asked["runtime_env"]["working_dir"] == str(tmp_path)
    assert {".git", ".venv*", "results", "runs/s"} <= set(asked["runtime_env"]["excludes"])


def test_a_jobs_command_runs_the_first_python3_where_its_parent_is_none_of_rays(tmp_path: Path) -> None:
    study = Study(name="s", trainers=("torch-ddp",), models=("cnn",), batch=8, world_sizes=(1,))
    command = job(study, tmp_path / "s.yaml", StudyFolder(tmp_path / "out"))["entrypoint"]
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    told = subprocess.run(
        ["sh", "-c", 'sh -c "$0"; exit', command], env=environ, capture_output=True, encoding="utf-8", timeout=60
    )
    assert told.stdout == "-m scalestudy.launch run s.yaml --launcher ray --out ~/scalestudy/s\n", told.stderr


@pytest.fixture
def there(tmp_path: Path, make_trial: MakeTrial, make_record: Callable[..., Record]) -> StudyFolder:
    folder = StudyFolder(tmp_path / "there")
    folder.create("t")
    for repeat in range(2):
        trial = make_trial(repeat=repeat)
        folder.finish(folder.begin(trial), make_record(trial))
    (folder.path / "results.csv").write_text("a,b\n")
    (folder.path / "figures").mkdir()
    (folder.path / "figures" / "x.png").write_bytes(b"png")
    return folder


def test_a_folder_comes_home_in_a_log_among_other_lines(there: StudyFolder, tmp_path: Path) -> None:
    home = StudyFolder(tmp_path / "home")
    home.create("t")
    log = f"some words of Ray's\n{packed(there.path)}and some more\n"
    assert unpack(log, home) == 2
    for name in ("results.csv", "figures/x.png"):
        assert (home.path / name).read_bytes() == (there.path / name).read_bytes()
    assert home.outcomes() == {"ok": 2}
    assert unpack(log, home) == 0


def test_a_trial_that_has_changed_is_set_aside_and_not_overwritten(
    there: StudyFolder, tmp_path: Path, make_trial: MakeTrial, make_record: Callable[..., Record]
) -> None:
    home = StudyFolder(tmp_path / "home")
    home.create("t")
    trial = make_trial(repeat=0)
    home.finish(home.begin(trial), make_record(trial, outcome="failed", reason="earlier"))
    assert unpack(packed(there.path), home) == 2
    assert home.outcomes() == {"ok": 2}
    [kept] = home.trials_path.glob("*.unfinished-1/record.json")
    assert "earlier" in kept.read_text()


def test_a_log_without_results_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the log holds no results; it ends: 'No such file'"):
        unpack("No such file\n", StudyFolder(tmp_path))


@pytest.mark.parametrize(
    ("resources", "found"),
    [({"CPU": 8.0, "GPU": 2.0}, (8, 2)), ({"CPU": 0.5}, None), ({"GPU": 1.0}, None), ({"CPU": None}, None)]
    + [(None, None)],
)
def test_nodes_are_those_that_take_work(resources: dict[str, float] | None, found: tuple[int, int] | None) -> None:
    nodes = [{"NodeID": "a", "Alive": True, "Resources": resources}, {"NodeID": "b", "Alive": False, "Resources": {}}]
    assert usable_nodes(nodes) == ({} if found is None else {"a": found})


@pytest.mark.parametrize("node", [{}, {"Alive": True, "Resources": {"CPU": 1}}, {"Alive": True, "Resources": ["CPU"]}])
def test_a_node_that_cannot_be_understood_is_quoted(node: dict[str, Any]) -> None:
    with pytest.raises(OSError, match="Ray tells of a node that cannot be understood: {"):
        usable_nodes([node])


@pytest.fixture
def answers() -> Iterator[Callable[..., str]]:
    """Return a maker of servers in a dashboard's place: an answer by the last part of a path."""
    servers: list[ThreadingHTTPServer] = []

    def serve(by_path: dict[str, tuple[int, str]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802
                code, text = by_path.get(self.path.rsplit("/", 1)[1], (200, "<html>Welcome to the proxy</html>"))
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


VERSION = (200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}))


def test_what_is_no_dashboard_is_named_with_its_words(answers: Callable[..., str]) -> None:
    with pytest.raises(InputError, match="--address: 'http://127.0.0.1:.*': no Ray dashboard answers"):
        ray_jobs.client(answers({}))


@pytest.mark.parametrize(
    "jobs", [(200, "<html>Bad gateway</html>"), (500, "traceback"), (200, "[{}]"), (200, '[{"status": "NEW"}]')]
)
@pytest.mark.parametrize(
    "asked",
    [ray_jobs.status, lambda folder: [ray_jobs.fetch(made, folder) for made in submitted(folder, "ray")]],
    ids=["status", "fetch"],
)
def test_an_answer_that_cannot_be_understood_is_one_line(
    answers: Callable[..., str], tmp_path: Path, jobs: tuple[int, str], asked: Callable[[StudyFolder], Any]
) -> None:
    address = answers({"version": VERSION, "": jobs})
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    folder.jobs_path.mkdir(exist_ok=True)
    note([Submitted(id="raysubmit_1", launcher="ray", study="s.yaml", address=address, results="~/x")], folder)
    with pytest.raises(ray_jobs.RayError, match=f"^{address}: (list_jobs|submit_job): Ray says: .") as caught:
        asked(folder)
    assert "\n" not in str(caught.value)
