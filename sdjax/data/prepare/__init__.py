"""Raw data -> a clean dataset on disk: cleaned shard by shard, freed of duplicates, split, written.

Each step writes files that appear whole or not at all, and leaves out those that are there, so a
run that was killed goes on where it stood. What a file holds depends on the input and the settings
alone, not on the workers.
"""
