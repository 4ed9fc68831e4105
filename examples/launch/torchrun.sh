#!/usr/bin/env bash
# Training on several nodes, started by hand: the same command on every node, only NODE_RANK differs.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/launch/torchrun.sh --config FILE --run-dir /shared/runs/a [flags]
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 examples/launch/torchrun.sh --config FILE --run-dir /shared/runs/a [flags]
#
# A first argument that ends in .py is run in place of training, e.g. tools/doctor.py. From the environment:
#
#   NNODES           number of nodes; MIN:MAX lets the run go on with fewer
#   NODE_RANK        0 .. NNODES-1, another one on every node; with MAX_RESTARTS also more, for spare nodes
#   MASTER_ADDR      name or address of node 0, as the other nodes reach it
#   MASTER_PORT      a free port there (default 29500)
#   NPROC_PER_NODE   processes per node (default: the number of GPUs)
#   MAX_RESTARTS     how often a node starts its ranks again after a failure (default 0)
#   PYTHON           interpreter (default: python)
#
# SIGTERM or SIGUSR1 to one of them: all ranks save after their step and exit with code 75; start them again with --resume.
# docs/launching.md explains the rest: network, storage, what to check when a run hangs.
set -euo pipefail

stop() { echo "error: $*" >&2; exit 2; }

missing=""
for name in NNODES NODE_RANK MASTER_ADDR; do
    [[ -n "${!name:-}" ]] || missing+=" $name"
done
[[ -z "$missing" ]] || stop "not set:$missing; example: NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 $0 --config FILE"
[[ "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || stop "NNODES must be a number of nodes, or MIN:MAX, got '$NNODES'"
MAX_RESTARTS="${MAX_RESTARTS:-0}"
[[ "$MAX_RESTARTS" =~ ^[0-9]+$ ]] || stop "MAX_RESTARTS must be a number, got '$MAX_RESTARTS'"
most_nodes="${NNODES#*:}"
[[ "$NODE_RANK" =~ ^[0-9]+$ ]] && { ((NODE_RANK < most_nodes)) || ((MAX_RESTARTS)); } ||
    stop "NODE_RANK must be 0 .. $((most_nodes - 1)) (NNODES=$NNODES), got '$NODE_RANK'"
(($#)) || stop "nothing to run: give training's flags (--config FILE ...), or a script"

if [[ -z "${NPROC_PER_NODE:-}" ]]; then
    NPROC_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || NPROC_PER_NODE=0
    ((NPROC_PER_NODE)) || stop "nvidia-smi finds no GPU here; set NPROC_PER_NODE for processes on CPU"
fi

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
# Kernels of one stream start in the order in which they were issued: communication first, where it is to be hidden.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Until the launcher listens; a scheduler's signal must not end it.
trap '' USR1
# Nothing else is printed until all nodes are there.
[[ "$NNODES" == 1 ]] ||
    echo "node $NODE_RANK of $NNODES, $NPROC_PER_NODE processes; meeting at $MASTER_ADDR:${MASTER_PORT:-29500}" >&2
if [[ "$1" == *.py ]]; then target=("$@"); else target=(-m megatron_ktr.train "$@"); fi
exec "${PYTHON:-python}" -m megatron_ktr.launch \
    --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" "${target[@]}"
