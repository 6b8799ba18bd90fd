"""The TFDS builders of sdjax."""
