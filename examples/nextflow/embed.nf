#!/usr/bin/env nextflow
// A proteome in shards: nextflow run examples/nextflow/embed.nf --input proteome.fasta.gz --shards 32
// Parts are taken from the cache on -resume; records that could not be embedded are gathered in rejected.tsv.

params.input   = null
params.outdir  = 'embeddings'
params.shards  = 8
params.weights = 'esm2-35m'

process EMBED {
    tag "shard ${shard}/${params.shards}"
    cpus 4
    memory '4 GB'
    // A retry begins its shard anew, because Nextflow gives it a new folder: take shards of an hour or so.
    // 1 also means that records were rejected, which is no reason to repeat the work: the output tells them apart.
    errorStrategy 'retry'
    maxRetries 2
    publishDir params.outdir, mode: 'link', pattern: '*.parquet'

    input:
    tuple val(shard), path(fasta)

    output:
    path "part-${shard}.parquet", emit: table
    path "part-${shard}.rejected.tsv", emit: rejected, optional: true

    script:
    """
    numpyesm embed ${fasta} -o part-${shard}.parquet --shard ${shard}/${params.shards} \\
        --weights ${params.weights} --threads ${task.cpus} --json-progress \\
        || { status=\$?; [ -s part-${shard}.parquet ] || exit \$status; }
    """
}

workflow {
    if (!params.input) error 'name the input: --input proteome.fasta.gz'
    shards = Channel.of(1..params.shards)
    // All files of a pattern are one input.
    files = Channel.fromPath(params.input, checkIfExists: true).collect().map { [it] }
    EMBED(shards.combine(files))
    EMBED.out.rejected.collectFile(name: 'rejected.tsv', storeDir: params.outdir, keepHeader: true)
}
