#!/bin/bash
# A proteome on a Slurm cluster: a job array, one shard a task.
#   sbatch --array=1-32 examples/slurm/embed_array.sh proteome.fasta.gz embeddings/
# A task that was killed (time limit, preemption, a lost node) is put back by Slurm and goes on where it stood.
#SBATCH --job-name=numpyesm
#SBATCH --cpus-per-task=8
#SBATCH --mem=4G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=numpyesm-%A_%a.log
set -euo pipefail

input=$1
folder=$2
weights=${WEIGHTS:-esm2-35m}
mkdir -p "$folder"

# Slurm sends SIGTERM before it kills: what is computed is kept either way.
exec numpyesm embed "$input" \
    --output "$folder/part-$(printf %05d "$SLURM_ARRAY_TASK_ID").parquet" \
    --shard "$SLURM_ARRAY_TASK_ID/${SLURM_ARRAY_TASK_COUNT:?submit it with --array=1-N}" \
    --weights "$weights" --threads "${SLURM_CPUS_PER_TASK:-1}" --json-progress

# All parts as one table, in the order of the input:
#   python -c "import polars; print(polars.read_parquet('embeddings/part-*.parquet').sort('record'))"
