"""What all exporters share: metadata and inputs of an artefact, the session interface, agreement of two."""
