"""Random changes of pictures while they are read: their geometry, colours and quality."""
