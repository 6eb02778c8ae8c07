#!/usr/bin/env bash
# A SLURM of two nodes on this machine, to try job scripts: bash tools/local_slurm.sh COMMAND...
#
# Starts munged, slurmctld and two slurmd on free ports, runs the command in their midst, and stops them.
# CPUS (default 8) is how many each node claims to have. Needs Debian's packages slurm-wlm and munge.
set -euo pipefail
for program in munged slurmctld slurmd; do
    PATH=$PATH:/usr/sbin command -v "$program" > /dev/null ||
        { echo "$program is missing. Run: apt-get install slurm-wlm munge" >&2; exit 1; }
done
PATH=$PATH:/usr/sbin
folder=$(mktemp -d /tmp/local_slurm.XXXXXX)
idle() { [ "$(sinfo --noheader --states=idle --format=%D 2> "$folder/sinfo.err")" = 2 ]; }
stop() {
    if [ "$(jobs -pr | wc -l)" = 4 ]; then
        scancel --user="$(id -un)" 2> "$folder/scancel.err" || true
        for _ in $(seq 60); do idle && break; sleep 0.5; done # a node's own processes end after its job
    fi
    for signal in TERM KILL; do # a slurmd that waits for its controller heeds the second only
        for daemon in $(jobs -pr); do kill -s "$signal" "$daemon"; done
        for _ in $(seq 50); do [ -z "$(jobs -pr)" ] && break; sleep 0.1; done
    done
    rm -rf "$folder"
}
trap stop EXIT

# Below the ports that the kernel gives to connections, so that none is taken before a daemon has it.
read -r controller first second < <(python3 - <<'PORTS'
import random, socket
opened = []
while len(opened) < 3:
    try:
        opened.append(socket.create_server(("", random.randrange(20000, 32000))))
    except OSError:
        continue
print(*(each.getsockname()[1] for each in opened))
PORTS
)
chmod 755 "$folder"
mkdir "$folder/state" "$folder/spool1" "$folder/spool2"
cat > "$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName=1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$first CPUs=${CPUS:-8}
NodeName=2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$second CPUs=${CPUS:-8}
PartitionName=all Nodes=1,2 Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munge.pid" --seed-file="$folder/munge.seed" 2> "$folder/munge.log" &
until [ -S "$folder/munge.socket" ]; do sleep 0.1; [ -n "$(jobs -pr)" ]; done
slurmctld -D -i 2> "$folder/slurmctld.err" &
for node in 1 2; do
    slurmd -D -N "$node" 2> "$folder/slurmd$node.err" &
    done
# The job's first process looks for its node's name, which no name server knows.
export MASTER_ADDR=127.0.0.1
until idle; do
    if [ "$(jobs -pr | wc -l)" != 4 ]; then
        tail -n 20 "$folder"/*.log "$folder"/*.err >&2
        exit 1
    fi
    sleep 0.5
done
"$@"
