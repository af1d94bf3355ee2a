#!/usr/bin/env bash
# A Slurm cluster of two nodes with eight pretended GPUs each, on this one machine: to try the scripts beside this one
# where there is no cluster, and to test them. Needs root on Debian; no systemd, no cgroups, nothing in /etc.
#
#   eval "$(containers/slurm/cluster.sh start)"    # installs slurm-wlm and munge if they are missing; sets SLURM_CONF
#   sbatch --wait containers/slurm/stage.sbatch convert families
#   containers/slurm/cluster.sh stop               # ends its jobs and its daemons, removes its files
set -euo pipefail

place=/run/baton-slurm # munge refuses a key where others could have put it
first_port=17817       # and the two after it
export SLURM_CONF=$place/slurm.conf

no_cluster() { # the exit code is one that a caller can tell from a failure
    echo "no Slurm cluster on this machine: $*" >&2
    exit 3
}

install() {
    local missing=
    for program in slurmctld slurmd munged sbatch; do command -v "$program" >/dev/null || missing=yes; done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || no_cluster "slurmctld, slurmd or munged is missing, and this is not Debian"
    export DEBIAN_FRONTEND=noninteractive
    # RUNLEVEL: the packages' own services stay off
    {
        apt-get update -qq &&
            RUNLEVEL=1 apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=120 slurm-wlm munge
    } >&2 || no_cluster "slurm-wlm and munge could not be installed"
}

configure() {
    mkdir -p "$place"/{state,n1,n2}
    chmod -R go-w "$place"
    for gpu in {0..7}; do [ -e "$place/gpu$gpu" ] || mknod "$place/gpu$gpu" c 1 3; done
    (umask 077 && head -c 128 /dev/urandom >"$place/munge.key")
    echo "Name=gpu File=$place/gpu[0-7]" >"$place/gres.conf"
    cat >"$SLURM_CONF" <<END
ClusterName=baton
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# a requeued job starts when the credential of its last start has run out
AuthInfo=socket=$place/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
EnforcePartLimits=ALL
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmctldPort=$first_port
StateSaveLocation=$place/state
SlurmctldPidFile=$place/slurmctld.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdSpoolDir=$place/%n
SlurmdPidFile=$place/%n/slurmd.pid
SlurmdLogFile=$place/%n/slurmd.log
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((first_port + 1)) CPUs=64 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((first_port + 2)) CPUs=64 Gres=gpu:8 State=UNKNOWN
PartitionName=normal Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
END
}

ready() { [ "$(sinfo --noheader --Node --partition=normal --states=idle,alloc,mix --format=%N 2>/dev/null | wc -l)" -eq 2 ]; }

start() {
    [ "$(id -u)" -eq 0 ] || no_cluster "it takes root"
    install
    if [ ! -e "$SLURM_CONF" ] || ! ready; then
        stop
        configure
        munged --key-file="$place/munge.key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
            --log-file="$place/munged.log" --seed-file="$place/munged.seed"
        slurmctld
        slurmd -N n1
        slurmd -N n2
        for _ in {1..150}; do
            ready && break
            sleep 0.2
        done
        ready || {
            tail -n 20 "$place"/*.log "$place"/n?/slurmd.log >&2
            echo "the cluster did not come up" >&2
            exit 1
        }
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

end_jobs() { # what has outlived the daemons: slurmstepd, and processes of jobs
    local folder
    for folder in /proc/[0-9]*; do
        grep -qzFx "SLURM_CONF=$SLURM_CONF" "$folder/environ" 2>/dev/null || continue
        grep -qz "^SLURM_JOB_ID=" "$folder/environ" 2>/dev/null || grep -q "^slurmstepd: " "$folder/cmdline" 2>/dev/null || continue
        kill -KILL "${folder#/proc/}" 2>/dev/null || true
    done
}

stop() {
    if [ -e "$SLURM_CONF" ] && ready; then
        for _ in {1..25}; do # again and again: an interrupted job may just be on its way back to the queue
            [ -n "$(squeue --noheader)" ] || break
            scancel --user=root
            scancel --user=root --signal=KILL
            sleep 0.2
        done
    fi
    for file in "$place"/n?/slurmd.pid "$place"/slurmctld.pid "$place"/munged.pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || continue
        for _ in {1..100}; do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
    end_jobs
    rm -rf "$place"
}

case ${1:-} in
start | stop) "$1" ;;
*)
    echo "usage: ${0##*/} start|stop" >&2
    exit 2
    ;;
esac
