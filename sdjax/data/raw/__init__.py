"""Raw image-text data: readers of folders, tars and parquet, and the cleaning of their rows."""
