#!/bin/bash
# Train on NODES nodes, every GPU of each. The same line on each node, in any order:
#
#   launch/torchrun.sh NODES HEAD:PORT RECIPE [key=value ...]
#
# HEAD is one of the nodes, by a name or address that all of them reach; for one node, localhost:29400.
# When a process fails, all of them start again from the newest checkpoint, as often as --max-restarts says.
# torchrun's own variables change what is not an argument here, e.g. PET_NPROC_PER_NODE=2.
set -eu
if [ $# -lt 3 ] || [[ ! $1 =~ ^[0-9]+(:[0-9]+)?$ ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2 # the comment above
    exit 2
fi
nodes=$1 head=$2 recipe=$3
shift 3
# Else one store serves every restart, and processes may read in it where those before them listened ("Connection refused"):
# https://github.com/pytorch/pytorch/issues/135712
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="$nodes" --nproc-per-node="${PET_NPROC_PER_NODE:-gpu}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-id="$(basename "$recipe" .toml)" \
    --max-restarts="${PET_MAX_RESTARTS:-10}" \
    -m transnormer train "$recipe" "$@"
