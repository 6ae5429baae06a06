#!/usr/bin/env bash
# A real SGLang on this CPU: serve.sh --port PORT [any flag of SGLang]. Up after 20 to 60 s, 1.5 GB of memory.
# Runs where install.py has put it, beside `venv` and `model`; any user who can read them can start it.
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# One thread: with more, torch's threads spin against each other and against everybody else on the machine.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$here/engine/stubs" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec "$here/venv/bin/python" "$here/engine/launch.py" \
  --model-path "$here/model" --served-model-name tiny --host 127.0.0.1 \
  --device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none \
  --disable-overlap-schedule --max-total-tokens 8192 --max-running-requests 8 --enable-metrics "$@"
