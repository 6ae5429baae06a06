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
  mkdir -p "/tmp/$2"
  [ -d "/tmp/$2/skypilot-runtime" ] || UV_CACHE_DIR=/tmp/uv_cache_$(id -u) UV_OFFLINE=1 \
    UV_FIND_LINKS=@BED@/wheels "$bin/uv" -q venv --seed --python /usr/bin/python3 "/tmp/$2/skypilot-runtime"
' _ "$SLURM_JOB_USER" "$name"
