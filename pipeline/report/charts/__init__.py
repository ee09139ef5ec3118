"""The charts of the report, one file each; `canvas` holds their common style and axes."""
