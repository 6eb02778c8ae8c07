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
daemons=()
idle() { [ "$(sinfo --noheader --states=idle --format=%D 2> "$folder/sinfo.err")" = 2 ]; }
stop() {
    scancel --user="$(id -un)" 2> "$folder/scancel.err" || true
    for _ in $(seq 60); do idle && break; sleep 0.5; done # a node's own processes end after its job
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
        kill "${daemons[i]}" 2> /dev/null && wait "${daemons[i]}" 2> /dev/null || true
    done
    rm -rf "$folder"
}
trap stop EXIT

read -r controller first second < <(python3 - <<'PORTS'
import socket
opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
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
daemons+=($!)
until [ -S "$folder/munge.socket" ]; do sleep 0.1; kill -0 "${daemons[0]}"; done
slurmctld -D -i 2> "$folder/slurmctld.err" &
daemons+=($!)
for node in 1 2; do
    slurmd -D -N "$node" 2> "$folder/slurmd$node.err" &
    daemons+=($!)
done
# The job's first process looks for its node's name, which no name server knows.
export MASTER_ADDR=127.0.0.1
until idle; do
    for daemon in "${daemons[@]}"; do
        kill -0 "$daemon" || { tail -n 20 "$folder"/*.log "$folder"/*.err >&2; exit 1; }
    done
    sleep 0.5
done
"$@"
