"""How ranks divide the CPUs of hosts: made-up trees of sysfs, and every small host that hypothesis thinks of."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalestudy.cluster.host import usable_cpus
from scalestudy.cluster.processors import Processor, cores_of, gpu_node, own_cpus, processors, shares, siblings

# A core: its NUMA node, its package, its number in the package, and its CPUs.
CoreSpec = tuple[int, int, int, list[int]]
HALF = 14


def sysfs(root: Path, cores: Sequence[CoreSpec], gpus: Sequence[int] = (), offline: Sequence[int] = ()) -> Path:
    """Write the files of sysfs that tell of these cores and of GPUs on these NUMA nodes."""
    by_node: dict[int, list[int]] = {}
    for node, package, core_id, cpus in cores:
        online = [cpu for cpu in cpus if cpu not in offline]
        by_node.setdefault(node, []).extend(online)
        for cpu in online:
            topology = root / f"devices/system/cpu/cpu{cpu}/topology"
            topology.mkdir(parents=True)
            (topology / "physical_package_id").write_text(f"{package}\n")
            (topology / "core_id").write_text(f"{core_id}\n")
            (topology / "thread_siblings_list").write_text(",".join(map(str, online)) + "\n")
    for node, cpus in by_node.items():
        folder = root / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(map(str, cpus)) + "\n")
    for index, node in enumerate(gpus):
        device = root / f"bus/pci/devices/0000:{index + 1:02x}:00.0"
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    return root


def host(sockets: int, cores: int, threads: int, *, adjacent: bool = False, nodes: int = 1) -> list[CoreSpec]:
    """Return the cores of a host, numbered as Linux does, first threads of all first, or with siblings side by side."""
    total = sockets * cores
    return [
        (
            index * nodes * sockets // total,
            index // cores,
            index % cores,
            [index * threads + thread if adjacent else thread * total + index for thread in range(threads)],
        )
        for index in range(total)
    ]


def of(root: Path, cores: Sequence[CoreSpec], only: Sequence[int] | None = None) -> list[Processor]:
    return processors(only if only is not None else [cpu for *_, cpus in cores for cpu in cpus], root)


def dealt(usable: Sequence[Processor], slots: int, share: int, near: Sequence[int | None] = ()) -> list[str]:
    """Return every slot's CPUs as ranges, and check that none stands twice."""
    found = shares(usable, slots, share, near)
    given_out = [cpu for own in found for cpu in own]
    assert len(given_out) == len(set(given_out)) == slots * share
    return [",".join(spans(own)) for own in found]


def spans(cpus: Sequence[int]) -> list[str]:
    starts = [cpu for cpu in cpus if cpu - 1 not in cpus]
    ends = [cpu for cpu in cpus if cpu + 1 not in cpus]
    return [f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True)]


def nodes_of(usable: Sequence[Processor], found: Sequence[Sequence[int]]) -> list[set[int]]:
    node = {processor.cpu: processor.node for processor in usable}
    return [{node[cpu] for cpu in own} for own in found]


def test_a_host_without_hyper_threads_is_cut_in_order(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(1, 8, 1)), cores)
    assert dealt(usable, 4, 2) == ["0-1", "2-3", "4-5", "6-7"]


def test_two_cores_of_two_threads(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(1, 2, 2)), cores)
    # A core each; a whole core each; then every core is shared.
    assert dealt(usable, 2, 1) == ["0", "1"]
    assert dealt(usable, 2, 2) == ["0,2", "1,3"]
    assert dealt(usable, 4, 1) == ["0", "1", "2", "3"]


GPUS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("adjacent", [False, True])
def test_eight_ranks_of_two_sockets_have_fourteen_whole_cores_on_the_node_of_their_gpu(
    tmp_path: Path, adjacent: bool
) -> None:
    cores = host(2, 56, 2, adjacent=adjacent)
    usable = of(sysfs(tmp_path, cores, GPUS), cores)
    near = [gpu_node(f"00000000:{index + 1:02X}:00.0", tmp_path) for index in range(8)]
    assert near == GPUS
    for share in (14, 28):
        found = shares(usable, 8, share, near)
        assert nodes_of(usable, found) == [{node} for node in GPUS]
        core_of = {processor.cpu: processor.core for processor in usable}
        used = [{core_of[cpu] for cpu in own} for own in found]
        assert [len(own) for own in used] == [HALF] * 8
        assert len(set().union(*used)) == 8 * HALF
    if not adjacent:
        assert dealt(usable, 8, 14, near)[:2] == ["0-13", "14-27"]
        assert dealt(usable, 8, 28, near)[4:6] == ["56-69,168-181", "70-83,182-195"]


def test_gpus_in_another_order_than_the_nodes_pull_their_ranks(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 4, 2)), cores)
    assert dealt(usable, 4, 2, [1, 0, 1, 0]) == ["4-5", "0-1", "6-7", "2-3"]


def test_ranks_go_to_the_other_socket_only_when_that_of_all_gpus_is_full(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 56, 2)), cores)
    found = shares(usable, 8, 14, [0] * 8)
    assert nodes_of(usable, found) == [{0}] * 4 + [{1}] * 4
    # All fit beside their GPUs.
    assert nodes_of(usable, shares(usable, 8, 7, [1] * 8)) == [{1}] * 8


def test_where_the_node_of_a_gpu_is_not_known_the_order_of_the_cores_decides(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 4, 2), [-1, 1]), cores)
    near = [gpu_node(f"00000000:{index + 1:02X}:00.0", tmp_path) for index in range(3)]
    assert near == [None, 1, None]
    assert dealt(usable, 4, 2, near[:1]) == ["0-1", "2-3", "4-5", "6-7"]
    assert dealt(usable, 4, 2, near) == ["0-1", "4-5", "2-3", "6-7"]
    # Named by a node that holds none of the process' CPUs.
    assert dealt(usable, 4, 2, [7]) == ["0-1", "2-3", "4-5", "6-7"]


def test_a_rank_that_finds_its_node_full_stays_on_its_package(tmp_path: Path) -> None:
    # As AMD's NPS4: four NUMA nodes a package; GPUs 0 and 1 on the last node of the first, 2 and 3 of the second.
    usable = of(sysfs(tmp_path, cores := host(2, 64, 2, nodes=4)), cores)
    assert len({processor.node for processor in usable}) == 8
    assert nodes_of(usable, shares(usable, 4, 16, [7, 7, 3, 3])) == [{7}, {4}, {3}, {0}]
    # Smaller shares have room on the node of their GPU.
    assert nodes_of(usable, shares(usable, 4, 8, [7, 7, 3, 3])) == [{7}, {7}, {3}, {3}]


def test_no_share_lies_on_two_nodes_while_it_fits_on_one(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 7, 1)), cores)
    assert dealt(usable, 4, 3) == ["0-2", "3-5", "7-9", "10-12"]
    assert dealt(usable, 2, 6) == ["0-5", "7-12"]
    assert dealt(usable, 7, 2)[-1] == "6,13"


def test_a_core_with_an_offline_thread_is_a_core_still(tmp_path: Path) -> None:
    cores = host(2, 4, 2)
    usable = of(sysfs(tmp_path, cores, offline=[10]), cores, [cpu for cpu in range(16) if cpu != 10])
    assert dealt(usable, 8, 1) == [str(cpu) for cpu in range(8)]
    # Core 2 has one thread: no rank of two needs it.
    assert dealt(usable, 7, 2) == ["0,8", "1,9", "3,11", "4,12", "5,13", "6,14", "7,15"]
    # Of an offline first thread the second is the core.
    first_gone = of(sysfs(tmp_path / "b", cores, offline=[0]), cores, range(1, 16))
    assert dealt(first_gone, 8, 1) == ["8", "1", "2", "3", "4", "5", "6", "7"]


def test_of_a_part_of_the_host_only_that_part_is_dealt(tmp_path: Path) -> None:
    root = sysfs(tmp_path, cores := host(2, 4, 2))
    # Two cores of the second socket with both threads, and second threads alone of two of the first.
    usable = of(root, cores, [4, 5, 12, 13, 10, 11])
    assert dealt(usable, 4, 1) == ["10", "11", "4", "5"]
    assert dealt(usable, 3, 2) == ["10-11", "4,12", "5,13"]


def test_gaps_in_the_numbers_of_cores_do_no_harm(tmp_path: Path) -> None:
    cores = [(0, 0, core_id, [index, 4 + index]) for index, core_id in enumerate((0, 3, 8, 27))]
    assert dealt(of(sysfs(tmp_path, cores), cores), 2, 4) == ["0-1,4-5", "2-3,6-7"]


def test_dies_that_number_their_cores_alike_do_not_share_them(tmp_path: Path) -> None:
    cores = [(0, 0, index % 2, [index, 4 + index]) for index in range(4)]
    assert sorted(dealt(of(sysfs(tmp_path, cores), cores), 4, 2)) == ["0,4", "1,5", "2,6", "3,7"]


def test_cores_of_one_and_of_two_threads_are_whole_cores_all(tmp_path: Path) -> None:
    # Four P-cores with two threads, eight E-cores with one.
    cores = [(0, 0, 4 * index, [2 * index, 2 * index + 1]) for index in range(4)]
    cores += [(0, 0, 16 + index, [8 + index]) for index in range(8)]
    usable = of(sysfs(tmp_path, cores), cores)
    assert dealt(usable, 3, 4) == ["0,2,4,6", "8-11", "12-15"]
    assert dealt(usable, 4, 4) == ["0-3", "4-7", "8-11", "12-15"]
    # Odd shares: a P-core or two and the E-core that makes it full.
    assert dealt(usable, 5, 3) == ["0-1,8", "2-3,9", "4-5,10", "6-7,11", "12-14"]


def test_odd_shares_share_a_core_only_where_none_is_left(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(1, 3, 2)), cores)
    assert dealt(usable, 2, 3) == ["0-1,3", "2,4-5"]
    four = of(sysfs(tmp_path / "b", cores := host(1, 4, 2)), cores)
    assert dealt(four, 2, 3) == ["0-1,4", "2-3,6"]


@pytest.mark.parametrize("broken", ["", "-1", "nonsense", "3-x"])
def test_what_sysfs_does_not_tell_is_a_core_of_its_own_on_one_node(tmp_path: Path, broken: str) -> None:
    if broken:
        for cpu in range(4):
            topology = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
            topology.mkdir(parents=True)
            for name in ("physical_package_id", "core_id", "thread_siblings_list"):
                (topology / name).write_text(broken)
        (tmp_path / "devices/system/node/node0").mkdir(parents=True)
        (tmp_path / "devices/system/node/node0/cpulist").write_text(broken)
    usable = processors(range(4), tmp_path)
    assert [(p.node, p.package, p.core) for p in usable] == [(0, 0, cpu) for cpu in range(4)]
    assert dealt(usable, 2, 2) == ["0-1", "2-3"]
    assert gpu_node("00000000:01:00.0", tmp_path) is None
    assert gpu_node("no address", tmp_path) is None


def test_this_host_can_be_read() -> None:
    assert [processor.cpu for processor in sorted(processors(usable_cpus()), key=lambda p: p.cpu)] == usable_cpus()


def ranks_cpus(
    usable: Sequence[Processor],
    used: int,
    per_node: int,
    threads: int,
    hyper_threads: bool = False,
    near: Sequence[int | None] = (),
    turn: int = 0,
) -> list[tuple[int, ...]]:
    return [
        own_cpus(
            usable,
            places=range(rank, rank + 1),
            local_devices=used,
            devices_per_node=per_node,
            threads=threads,
            hyper_threads=hyper_threads,
            near=near,
            turn=turn,
        )
        for rank in range(used)
    ]


def test_a_rank_has_the_same_cpus_at_every_world_size(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 56, 2)), cores)
    for threads, hyper_threads in ((14, False), (28, True)):
        full = ranks_cpus(usable, 8, 8, threads, hyper_threads)
        for used in (1, 2, 4):
            assert ranks_cpus(usable, used, 8, threads, hyper_threads) == full[:used]


def test_threads_for_fewer_devices_than_a_node_has_are_whole_cores(tmp_path: Path) -> None:
    # A study of at most two ranks on four cores: two threads each, though a device is one core.
    usable = of(sysfs(tmp_path, cores := host(1, 4, 2)), cores)
    assert ranks_cpus(usable, 2, 4, 2) == [(0, 1), (2, 3)]
    assert ranks_cpus(usable, 1, 4, 2) == [(0, 1)]


def test_a_process_of_several_devices_has_the_cpus_of_all_of_them(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 4, 2)), cores)
    fields = {"devices_per_node": 4, "threads": 2, "hyper_threads": False, "near": [1, 0, 1, 0]}
    assert own_cpus(usable, places=range(2), local_devices=2, **fields) == (0, 1, 4, 5)  # type: ignore[arg-type]


def test_every_repeat_computes_on_the_next_share_of_the_cpus(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 4, 2)), cores)
    # Both threads of two cores are a device: four of them, two on each socket.
    all_four = [(0, 1, 8, 9), (2, 3, 10, 11), (4, 5, 12, 13), (6, 7, 14, 15)]
    for turn in range(5):
        first = 2 * turn % 4
        assert ranks_cpus(usable, 1, 4, 4, True, turn=turn) == [all_four[turn % 4]]
        assert ranks_cpus(usable, 2, 4, 4, True, turn=turn) == all_four[first : first + 2]
        assert ranks_cpus(usable, 4, 4, 4, True, turn=turn) == all_four


def test_the_cpus_of_a_gpu_are_the_same_in_every_trial_that_drives_it(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 56, 2)), cores)
    full = ranks_cpus(usable, 8, 8, 14, near=GPUS)
    for turn in range(9):
        assert ranks_cpus(usable, 1, 8, 14, near=GPUS, turn=turn) == [full[turn % 8]]
        first = 2 * turn % 8
        assert ranks_cpus(usable, 2, 8, 14, near=GPUS, turn=turn) == full[first : first + 2]


def test_a_rank_has_cpus_near_its_gpu_where_there_are_not_enough_for_all_gpus(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(2, 4, 1)), cores)
    # A study of two devices a node and four threads each: two shares, for the GPUs that the repeat takes.
    by_turn = [ranks_cpus(usable, 2, 2, 4, near=GPUS, turn=turn) for turn in range(4)]
    first, second = (0, 1, 2, 3), (4, 5, 6, 7)
    assert by_turn == [[first, second], [first, second], [second, first], [second, first]]
    assert [ranks_cpus(usable, 1, 1, 4, near=GPUS, turn=turn) for turn in (3, 4)] == [[first], [second]]


def test_with_too_few_cpus_for_all_a_rank_keeps_what_it_may_use(tmp_path: Path) -> None:
    usable = of(sysfs(tmp_path, cores := host(1, 2, 2)), cores)
    assert ranks_cpus(usable, 2, 8, 3) == [(0, 1, 2, 3)] * 2
    # Fewer cores than the study was told of, and threads enough.
    assert ranks_cpus(usable, 2, 8, 2) == [(0, 2), (1, 3)]


@st.composite
def hosts(draw: st.DrawFn) -> list[Processor]:
    """Return CPUs of some cores of one or two threads, on up to three NUMA nodes."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2)), min_size=1, max_size=12))
    found: list[Processor] = []
    for index, (node, threads) in enumerate(sorted(sizes, key=lambda size: size[0])):
        first = 2 * index
        found += [Processor(node, node // 2, index, first, first + thread) for thread in range(threads)]
    return found


@given(hosts(), st.data())
def test_whatever_the_host_shares_are_full_apart_and_on_whole_cores_if_that_can_be(
    usable: list[Processor], data: st.DataObject
) -> None:
    threads = data.draw(st.integers(1, len(usable)))
    slots = data.draw(st.integers(1, len(usable) // threads))
    near = data.draw(st.lists(st.none() | st.integers(0, 3), max_size=slots))
    found = shares(usable, slots, threads, near)
    assert found == shares(usable, slots, threads, near)
    assert [len(own) for own in found] == [threads] * slots
    given_out = Counter(cpu for own in found for cpu in own)
    assert set(given_out) <= {processor.cpu for processor in usable}
    assert max(given_out.values()) == 1
    core_of = {processor.cpu: processor.core for processor in usable}
    users = Counter(core for own in found for core in {core_of[cpu] for cpu in own})
    doubles = sum(len(core) == 2 for core in cores_of(usable))
    singles = len(cores_of(usable)) - doubles
    # An odd share needs a core of one thread, or wastes a thread of one with two.
    wasted = max(0, slots - singles) if threads % 2 else 0
    if slots * threads <= singles + doubles:
        firsts = {processor.cpu for processor in usable if processor.cpu == processor.core}
        assert set(given_out) <= firsts
    if slots * threads <= singles + doubles or slots * threads + wasted <= singles + 2 * doubles:
        assert max(users.values()) == 1


@given(hosts(), st.data(), st.booleans())
def test_whatever_the_host_a_rank_has_the_same_cpus_at_every_world_size(
    usable: list[Processor], data: st.DataObject, hyper_threads: bool
) -> None:
    threads = data.draw(st.integers(1, len(usable)))
    per_node = data.draw(st.integers(1, 8))
    # As many as the study's node holds; `launch/study.py` sees to it.
    room = len(usable if hyper_threads else cores_of(usable)) // threads
    sizes = range(1, min(per_node, room) + 1)
    found = [ranks_cpus(usable, size, per_node, threads, hyper_threads) for size in sizes]
    for ranks in found:
        assert ranks == found[-1][: len(ranks)]


@given(hosts(), st.data(), st.booleans())
def test_whatever_the_host_ranks_have_cpus_of_their_own_in_every_repeat(
    usable: list[Processor], data: st.DataObject, hyper_threads: bool
) -> None:
    threads = data.draw(st.integers(1, len(usable)))
    per_node = data.draw(st.integers(1, 8))
    near = data.draw(st.just([]) | st.lists(st.none() | st.integers(0, 3), min_size=per_node, max_size=8))
    room = len(usable if hyper_threads else cores_of(usable)) // threads
    size, turn = data.draw(st.integers(0, min(per_node, room))), data.draw(st.integers(0, 9))
    found = ranks_cpus(usable, size, per_node, threads, hyper_threads, near, turn)
    assert [len(own) for own in found] == [threads] * size
    given_out = {cpu for own in found for cpu in own}
    assert len(given_out) == size * threads
    assert given_out <= {processor.cpu for processor in usable}


def test_whoever_shares_a_core_is_known(tmp_path: Path) -> None:
    root = sysfs(tmp_path, [(0, 0, core, [core, core + 2]) for core in range(2)])
    assert siblings([0], root) == [0, 2]
    assert siblings([1, 3], root) == [1, 3]
    # Of what the kernel says nothing it is a core of its own.
    assert siblings([7], root) == [7]
