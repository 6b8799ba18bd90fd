"""Raw data -> a clean dataset on disk: cleaned shard by shard, freed of duplicates, split, written.

Each step writes files that appear whole or not at all, and skips existing ones. So a run that was
killed continues where it was. The contents of a file depend on the input and the settings alone,
not on the workers.
"""
