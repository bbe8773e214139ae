#!/usr/bin/env bash
# Trains on all GPUs of this machine.
#
#   bash launch/one_machine_gpus.sh                  one process that uses all of them: nearly always the right way
#   bash launch/one_machine_gpus.sh process-per-gpu  one for each: when reading the images in one process is too slow
#
# Ctrl-C or SIGTERM stops and saves; run it again to go on. To train on some of the GPUs only, set CUDA_VISIBLE_DEVICES.
# As a service, or at a shutdown, it gets SIGTERM from systemd and 90 seconds; TimeoutStopSec=120 in the unit is safer.
set -uo pipefail

RUNS=${RUNS:-$HOME/runs}
PORT=${PORT:-12345}  # where the processes meet: any that is free

if [ "${1:-}" != process-per-gpu ]; then
  exec jmoe train experiments/vmoe_s32_imagenet1k.py --workdir "$RUNS/s32"
fi

list=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null)}
if [ -z "$list" ]; then
  echo "No GPU was found: nvidia-smi lists none or is missing. Name them, as in CUDA_VISIBLE_DEVICES=0,1." >&2
  exit 2
fi
mapfile -t gpus < <(tr ',' '\n' <<< "$list")
processes=${#gpus[@]}
pids=()
# Passed on to all. Those that train take it for one request with the Ctrl-C that the terminal sends them as well; those
# that are still starting would miss that, because bash keeps it from what it starts with &.
trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM INT
for process in "${!gpus[@]}"; do
  # --local: all processes are on this machine, so that they may meet at a loopback address.
  CUDA_VISIBLE_DEVICES=${gpus[process]} \
    jmoe train experiments/vmoe_s32_imagenet1k.py --workdir "$RUNS/s32" \
    --local --coordinator "127.0.0.1:$PORT" --processes "$processes" --process "$process" &
  pids+=($!)
done

# They end together, and with the same status.
status=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; done  # wait returns early when a signal comes
  wait "$pid" || status=$?
done
exit $status
