#!/usr/bin/env bash
# PID 1 of one host of the bed, in namespaces of its own (bed.sh: up). Reaps orphans; the host ends with it.
set -eu
host=$1 BED=$2
cd /
hostname "$host"
mount --make-rprivate /
mount --bind "$BED/node/$host/tmp" /tmp
mount --bind "$BED/etc/hosts" /etc/hosts
if [ "$host" = login ]; then
  mkdir -p /run/sshd
  # shellcheck disable=SC2086
  runuser -u munge -- munged --foreground --force --socket="$BED/run/munge/sock" --key-file="$BED/etc/munge/key" \
    --pid-file="$BED/run/munge/pid" --log-file="$BED/log/munge/log" --seed-file="$BED/log/munge/seed" &
  until [ -S "$BED/run/munge/sock" ]; do sleep 0.05; done
  slurmctld -D -f "$BED/etc/slurm.conf" &
  /usr/sbin/sshd -D -e -f "$BED/etc/sshd_config" &
else
  # slurmd ends a job's processes through the (v1) freezer cgroup, here in a subtree of the node's own.
  mount -t tmpfs cg /sys/fs/cgroup
  mkdir /sys/fs/cgroup/freezer
  mount -t cgroup -o freezer cg /sys/fs/cgroup/freezer
  mkdir -p "/sys/fs/cgroup/freezer/skybed/$host"
  mount --bind "/sys/fs/cgroup/freezer/skybed/$host" /sys/fs/cgroup/freezer
  until [ -S "$BED/run/munge/sock" ]; do sleep 0.05; done
  slurmd -D -N "$host" -f "$BED/etc/slurm.conf" &
fi
wait
