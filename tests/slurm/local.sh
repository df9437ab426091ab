#!/usr/bin/env bash
# A one-node Slurm on this machine for the tests: local.sh start <folder> | stop <folder>. Needs root
# and Debian's slurm-wlm and munge. A Slurm that answers already is left alone.
# (nproc alone would count OMP_NUM_THREADS.)
set -euo pipefail
folder=$2
host=$(hostname)

start() {
  sinfo -h >/dev/null 2>&1 && return
  mkdir -p "$folder/state" "$folder/spool" /run/munge /etc/slurm
  cat >/etc/slurm/slurm.conf <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
  chown munge /run/munge
  pgrep -x munged >/dev/null || su -s /bin/sh munge -c /usr/sbin/munged
  slurmctld
  slurmd
  for _ in $(seq 40); do
    sinfo -h -o %t 2>/dev/null | grep -q idle && return
    sleep 0.5
  done
  echo "Slurm did not come up: see $folder/slurmctld.log and $folder/slurmd.log" >&2
  return 1
}

stop() {
  for daemon in slurmd slurmctld; do
    [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" || true
  done
}

"$1"
