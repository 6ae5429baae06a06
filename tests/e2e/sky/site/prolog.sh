#!/bin/bash
# Root, once per job and node: what a site's image would carry. uv where SkyPilot looks for it (it would be
# fetched from the web), and SkyPilot's runtime environment (it would ask uv for a Python 3.10).
export SLURM_CONF=@BED@/etc/slurm.conf
for _ in $(seq 20); do   # a busy controller does not answer every time
  name=$(squeue -h -j "$SLURM_JOB_ID" -o %j) && [ -n "$name" ] && break
  sleep 0.5
done
# Only jobs that are SkyPilot clusters.
[ -n "$name" ] && [ -e "@BED@/home/$SLURM_JOB_USER/.sky_provision/$name.sh" ] || exit 0
# shellcheck disable=SC2016
exec runuser -u "$SLURM_JOB_USER" -- bash -ec '
  bin=@BED@/home/$1/.sky_clusters/$2/.local/bin; mkdir -p "$bin"; ln -sfn @BED@/tools/bin/uv "$bin/uv"
  echo "$bin" >/tmp/.uv-$3   # for taskprolog.sh
  mkdir -p "/tmp/$2"
  wheels=@BED@/home/$1/.sky_clusters/$2/.sky/wheels; mkdir -p "$wheels"
  [ -d "/tmp/$2/skypilot-runtime" ] || cp -al /tmp/.runtime "/tmp/$2/skypilot-runtime"
  cp /tmp/.wheel "$wheels/current_sky_wheel_hash"
' _ "$SLURM_JOB_USER" "$name" "$SLURM_JOB_ID"
