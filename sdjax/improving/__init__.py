"""A model made better where it fails: find, propose, collect, fine-tune, judge again."""
