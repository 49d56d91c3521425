#!/bin/bash
# Process 1 of one host of the lab, in namespaces of its own; lab.py starts it.
#
# usage: host.sh LAB_FOLDER HOST SHARED_FOLDER...
# Shared folders below /tmp stay visible although each host has a /tmp of its own.
set -euo pipefail
lab=$1 host=$2
shift 2

hostname "$host"
mount --make-rprivate /
mount -t tmpfs -o mode=1777 none /dev/shm
mount -t tmpfs -o mode=755 none /run
# One place without blanks, wherever the lab lies: slurm.conf cannot quote.
mkdir -p /run/lab /run/munge /run/aside /etc/slurm
mount --bind "$lab" /run/lab
mount --bind /run/lab/etc/slurm /etc/slurm
mount --bind /run/lab/etc/hosts /etc/hosts
if [[ -e /etc/resolv.conf ]]; then
  mount --bind /run/lab/etc/resolv.conf "$(readlink -f /etc/resolv.conf)"
fi
number=0
for folder in "$@"; do
  number=$((number + 1))
  mkdir -p "/run/aside/$number"
  mount --bind "$folder" "/run/aside/$number"
done
mount -t tmpfs -o mode=1777 none /tmp
number=0
for folder in "$@"; do
  number=$((number + 1))
  [[ $folder = /tmp/* ]] || continue
  mkdir -p "$folder"
  mount --bind "/run/aside/$number" "$folder"
done
cd /

until [[ -e /run/lab/run/$host.network ]]; do sleep 0.02; done
rm /run/lab/run/"$host".network

install -m 600 /run/lab/etc/munge.key /run/munge/key
munged --key-file=/run/munge/key --log-file=/run/munge/log --seed-file=/run/munge/seed
if [[ $host = control ]]; then
  slurmctld -D -i >/dev/null 2>&1 &
else
  slurmd -D -N "$host" >/dev/null 2>&1 &
fi
# Stay, and collect the ended children of processes that are gone.
while :; do
  sleep 3600 &
  wait $! || true
done
