"""Bulk work: FASTA in, Parquet, HDF5 or a folder out; on one machine, a job array, or a Ray cluster."""

from .job import Summary, embed_fasta
from .progress import BarProgress, JsonProgress, Progress

__all__ = ["BarProgress", "JsonProgress", "Progress", "Summary", "embed_fasta"]
