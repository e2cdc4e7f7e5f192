#!/bin/bash
# A proteome on a Slurm cluster: a job array, one shard a task.
#   sbatch --array=1-32 examples/slurm/embed_array.sh proteome.fasta.gz embeddings/ 32
# The number of shards is given again, so that single tasks can be repeated: sbatch --array=7,9 … 32.
# A task that was preempted or lost its node is put back by Slurm, one near its time limit puts itself back; both resume
# where they stopped.
#SBATCH --job-name=numpyesm
#SBATCH --cpus-per-task=8
#SBATCH --mem=4G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=numpyesm-%A_%a.log
set -euo pipefail

input=${1:?the FASTA file}
folder=${2:?the folder for the parts}
shards=${3:?how many shards there are: the N of --array=1-N}
weights=${WEIGHTS:-esm2-35m}
mkdir -p "$folder"

part=$folder/part-$(printf %05d "$SLURM_ARRAY_TASK_ID")

# What is computed is kept, however the task ends.
numpyesm embed "$input" --output "$part.parquet" --shard "$SLURM_ARRAY_TASK_ID/$shards" \
    --weights "$weights" --threads "${SLURM_CPUS_PER_TASK:-1}" --json-progress &
run=$!
trap 'kill "$run"; wait "$run" || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
status=0
wait "$run" || status=$?
# 1 also means that records were rejected: they are listed, and the part is whole.
if [ "$status" = 1 ] && [ -s "$part.rejected.tsv" ] && [ -s "$part.parquet" ]; then status=0; fi
exit "$status"

# All parts as one table, in the order of the input:
#   python -c "import polars; print(polars.read_parquet('embeddings/part-*.parquet').sort('record'))"
