"""Raw image-text data: readers of folders, tar shards and parquet, and what becomes of a row."""
