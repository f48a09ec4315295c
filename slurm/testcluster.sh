#!/usr/bin/env bash
# A Slurm cluster of several nodes on this one host, for tests: real munged, slurmctld and slurmd, no systemd.
#
#   slurm/testcluster.sh up [DIR]      start it; prints the SLURM_CONF to use
#   slurm/testcluster.sh down [DIR]    end what `up` started there, and nothing else
#
# DIR (default: build/testcluster) holds all of it. It has its own key, sockets and ports, and reads no configuration
# outside DIR, so that a cluster already on this machine is not touched. NODES, CPUS and GPUS set its size.
set -euo pipefail

action=${1:-}
dir=$(realpath -m "${2:-build/testcluster}")
nodes=${NODES:-4} cpus=${CPUS:-4} gpus=${GPUS:-2}
# munged, slurmctld and slurmd lie where a user's PATH may not reach.
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "testcluster: $*" >&2
    exit 1
}

# Three free ports and one for every node, away from Slurm's own 6817 and 6818.
free_port() {
    local port=$1
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

configure() {
    local me port node
    me=$(id -un)
    port=$(free_port 19000)
    # Character devices stand in for GPUs: Slurm counts, binds and hides them as it would /dev/nvidia0.
    local files=(/dev/zero /dev/full /dev/random /dev/urandom)
    [ "$gpus" -le ${#files[@]} ] || fail "GPUS=$gpus: at most ${#files[@]}"
    cat > "$dir/slurm.conf" <<CONF
ClusterName=scalestudy-test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmctldParameters=enable_configless
SlurmUser=$me
SlurmdUser=$me
# A requeued job waits for its credentials' life, two minutes by default, before it starts again.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
SlurmdSpoolDir=$dir/spool-%n
# Nodes larger than their share of this host.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
MpiDefault=none
# A lost node is noticed in seconds, and is back as soon as its slurmd is.
SlurmdTimeout=10
ReturnToService=2
KillWait=10
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES DefaultTime=30 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL DefaultTime=30 PriorityTier=2 PreemptMode=OFF
CONF
    : > "$dir/gres.conf"
    for ((node = 1; node <= nodes; node++)); do
        echo "NodeName=node$node NodeHostname=$(uname -n) NodeAddr=127.0.0.$((10 + node))" \
            "Port=$((port + node)) CPUs=$cpus RealMemory=4000 Gres=gpu:$gpus" >> "$dir/slurm.conf"
        for ((gpu = 0; gpu < gpus; gpu++)); do
            echo "NodeName=node$node Name=gpu File=${files[$gpu]}" >> "$dir/gres.conf"
        done
    done
}

# Each is a program, its pid file and words of its command line that only ours has.
ours() {
    echo "munged $dir/munged.pid $dir/munge.socket"
    echo "slurmctld $dir/slurmctld.pid $dir/slurm.conf"
    local file
    for file in "$dir"/slurmd-*.pid; do
        [ -e "$file" ] && echo "slurmd $file $dir/slurm.conf"
    done
    return 0
}

up() {
    local program node
    for program in munged slurmctld slurmd; do
        command -v "$program" > /dev/null ||
            fail "$program is not installed; on Debian: apt-get install slurm-wlm munge"
    done
    [ ! -e "$dir/slurm.conf" ] || fail "$dir: is there already; end it first: slurm/testcluster.sh down $dir"
    mkdir -p "$dir/state"
    # munged wants folders that others cannot write to.
    chmod 755 "$dir"
    configure
    head -c 1024 /dev/urandom > "$dir/munge.key"
    chmod 400 "$dir/munge.key"
    # --force: the folders above may be a temporary one that others can write to, and the user may be root.
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" --num-threads=2
    slurmctld -f "$dir/slurm.conf"
    for ((node = 1; node <= nodes; node++)); do
        slurmd -f "$dir/slurm.conf" -N "node$node"
    done
    export SLURM_CONF=$dir/slurm.conf
    for ((try = 0; try < 60; try++)); do
        if [ "$(sinfo --noheader --Node --partition=test --states=idle --format=%N 2> /dev/null | wc -l)" = "$nodes" ]; then
            echo "SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    sinfo >&2 || true
    fail "the nodes are not idle after 30 s; see $dir/*.log"
}

down() {
    local program file words pid
    [ -e "$dir/slurm.conf" ] || fail "$dir: no cluster there"
    # Jobs first: their processes are not the daemons' to take along.
    SLURM_CONF=$dir/slurm.conf timeout 20 scancel --quiet --signal=KILL --full --user="$(id -un)" || true
    while read -r program file words; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        # A pid may have been given to somebody else since.
        if { tr '\0' ' ' < "/proc/$pid/cmdline"; } 2> /dev/null | grep -qF "$words"; then
            kill "$pid"
            timeout 10 tail --pid="$pid" -f /dev/null || kill -KILL "$pid" || fail "$program ($pid) does not end"
        fi
    done < <(ours | sort -r)
    rm -r "$dir"
}

case $action in
    up | down) "$action" ;;
    *) fail "usage: slurm/testcluster.sh up|down [DIR]" ;;
esac
