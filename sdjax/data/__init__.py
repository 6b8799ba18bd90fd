"""Data: TFDS builders written as ArrayRecord, read through Grain into batches of NumPy arrays."""
