"""Examples that are drawn more often than others."""
