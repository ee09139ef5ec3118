"""One thin file per DVC stage: paths in, paths out, one section of params.yaml, one call."""
