#!/bin/sh
# The user, every step: packages come from the wheelhouse. (`uv venv --seed` heeds UV_OFFLINE, not UV_NO_INDEX.)
echo export UV_OFFLINE=1
echo export UV_FIND_LINKS=@BED@/wheels
echo export UV_PYTHON_DOWNLOADS=never
