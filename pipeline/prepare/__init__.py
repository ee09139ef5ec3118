"""Image folders, parquet files and archives -> the prepared folder that every later stage reads."""
