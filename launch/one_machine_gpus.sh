#!/usr/bin/env bash
# Trains on all GPUs of this machine.
#
#   bash launch/one_machine_gpus.sh                  one process that uses all of them: nearly always the right way
#   bash launch/one_machine_gpus.sh process-per-gpu  one for each: when reading the images in one process is too slow
#
# Ctrl-C or SIGTERM stops and saves; run it again to go on. To train on some of the GPUs only, set CUDA_VISIBLE_DEVICES.
set -uo pipefail

RUNS=${RUNS:-$HOME/runs}

if [ "${1:-}" != process-per-gpu ]; then
  exec jmoe train experiments/vmoe_s32_imagenet1k.py --workdir "$RUNS/s32"
fi

# --local: all processes are on this machine, so that they may meet at a loopback address.
mapfile -t gpus < <(tr ',' '\n' <<< "${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader)}")
processes=${#gpus[@]}
pids=()
for process in "${!gpus[@]}"; do
  CUDA_VISIBLE_DEVICES=${gpus[process]} \
    jmoe train experiments/vmoe_s32_imagenet1k.py --workdir "$RUNS/s32" \
    --local --coordinator 127.0.0.1:12345 --processes "$processes" --process "$process" &
  pids+=($!)
done

# They end together, and with the same status. A signal to this script is passed on to all of them.
trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM INT
status=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; done  # wait returns early when a signal comes
  wait "$pid" || status=$?
done
exit $status
