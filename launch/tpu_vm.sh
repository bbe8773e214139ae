#!/usr/bin/env bash
# Trains on a slice of TPU VMs, from your own machine: the same command on every host of the slice, over ssh.
#
#   bash launch/tpu_vm.sh
#
# Run it again to go on after a preemption, once the slice is there again: a spot slice that was taken is deleted and
# created anew under the same name (gcloud compute tpus tpu-vm delete, then create). Closing ssh does not stop the run,
# which has its log in train.log on each host. To stop and save, send SIGTERM to it on any one host:
#
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command='kill -TERM $(cat train.pid)'
#
# Nobody ends it after a grace period then. When a spot slice is taken, jmoe hears it from the machines' metadata and saves;
# there are about 30 seconds for that, which cannot be set. Where that is too little, set checkpoint.every to what you can
# lose.
set -euo pipefail

TPU=my-slice            # its name; a v5litepod-256 has 64 hosts
ZONE=us-west4-a
RUNS=10.0.0.2:/runs     # an NFS share (Filestore) that holds the work folder and the datasets, mounted on every host

on_every_host() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

# Two runs would compete for the chips and the work folder.
on_every_host '
  if kill -0 "$(cat ~/train.pid 2> /dev/null)" 2> /dev/null; then
    echo "A run is going on here, as process $(cat ~/train.pid) (train.pid): stop it first." >&2
    exit 1
  fi
'

# Each time, as new machines have nothing. The same versions everywhere: name the one of jmoe that you want.
on_every_host "
  set -e
  mountpoint -q /mnt/runs || {
    sudo apt-get install -qq nfs-common
    sudo mkdir -p /mnt/runs
    sudo mount $RUNS /mnt/runs
  }
  [ -d ~/jmoe ] || git clone --quiet https://github.com/OWNER/jmoe ~/jmoe
  # The images have an older Python than jmoe needs.
  [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -d ~/venv ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/venv
  ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e ~/'jmoe[train,tpu]'
"

# No addresses: the hosts of a slice know each other from their metadata.
on_every_host '
  cd ~/jmoe
  export JMOE_DATA_DIR=/mnt/runs/datasets PATH="$HOME/venv/bin:$PATH"
  nohup jmoe train experiments/vmoe_s32_imagenet1k.py --workdir /mnt/runs/s32 > ~/train.log 2>&1 < /dev/null &
  echo $! > ~/train.pid
'

# The log of process 0 has the table of hosts and the losses. Ctrl-C here ends only the watching.
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command='tail -n +1 -F train.log'
