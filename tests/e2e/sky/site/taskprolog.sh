#!/bin/sh
# The user, every step: packages come from the wheelhouse. (`uv venv --seed` heeds UV_OFFLINE, not UV_NO_INDEX.)
echo export UV_OFFLINE=1
echo export UV_FIND_LINKS=@BED@/wheels
echo export UV_PYTHON_DOWNLOADS=never
# The last job of the same name may remove their common home when this one has begun: uv would then be fetched again.
if read -r bin 2>/dev/null </tmp/.uv-"$SLURM_JOB_ID" && [ ! -e "$bin/uv" ]; then
  mkdir -p "$bin" && ln -sfn @BED@/tools/bin/uv "$bin/uv"
fi
