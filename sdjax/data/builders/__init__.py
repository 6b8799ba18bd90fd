"""TFDS builders of sdjax."""
