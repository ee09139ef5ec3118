"""The JSON files that only the report reads, as strict models; those of several readers are in pipeline/core."""
