#!/usr/bin/env bash
# Trains on TPU slices in Google Kubernetes Engine through xpk, which writes the job set.
#
#   bash launch/xpk.sh
#
# xpk restarts all pods after a preemption or a lost host (--max-restarts), and the same command goes on from the last
# checkpoint. To stop and save: xpk workload delete --cluster=CLUSTER --workload=WORKLOAD; run this again to go on.
set -euo pipefail

CLUSTER=my-cluster
PROJECT=my-project
ZONE=us-west4-a
TPU_TYPE=v5litepod-256
SLICES=1
IMAGE=REGISTRY/jmoe:VERSION  # with jmoe[train,tpu] and the experiments in /jmoe
WORKLOAD=vmoe-s32

# /mnt/runs is storage that the cluster mounts into every pod (xpk storage attach). No addresses: the node pool tells
# each pod the others. By itself xpk starts again only after statuses 42 and 127 to 255; a lost process (75) and a run
# that hung (76) are to be tried again, too. The grace period, from SIGTERM to the end, would be 30 seconds. The command
# is one line, because xpk pastes it into YAML; exec: the signal must reach the training, not a shell.
xpk workload create \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="$SLICES" \
  --docker-image="$IMAGE" --max-restarts=100 --restart-on-exit-codes=75,76 --termination-grace-period-seconds=120 \
  --command='cd /jmoe && export JMOE_DATA_DIR=/mnt/runs/datasets && exec jmoe train experiments/vmoe_s32_imagenet1k.py --workdir /mnt/runs/s32'
