"""The pictures of the report, a file each; `canvas` is what they share."""
