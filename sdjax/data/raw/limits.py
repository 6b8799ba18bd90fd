"""Limits on the parts of untrusted files that are read. docs/prepare.md has the same table.

All are far beyond honest data. Without them one small file could take all memory or all time of a
machine. A row beyond one is skipped and counted; a shard is read up to that point.
"""

from sdjax.data.image_files import MOST_BYTES

MOST_PICTURE_BYTES = MOST_BYTES  # bytes of an encoded picture
MOST_CAPTION_CHARS = 100_000  # of a caption: text encoders read some 77 to 512 tokens of it
MOST_CAPTION_BYTES = 4 * MOST_CAPTION_CHARS  # bytes of a caption's file, in UTF-8
MOST_ROW_BYTES = 4 << 20  # of a line of JSON, a row of CSV, the .json of a tar, a cell of parquet
MOST_WHOLE_BYTES = 64 << 20  # of metadata read as a whole: a JSON array, UTF-16 and UTF-32
MOST_NAME_CHARS = 4096  # of a file_name, as long as a path of Linux
# gzip makes the headers and padding of a tar, blocks of 512 bytes, 20 times smaller, and pictures
# hardly smaller.
MOST_EXPANSION = 100  # unpacked bytes for each byte of a gzip file ...
EXPANSION_SLACK = 64 << 20  # ... and as many besides
MOST_NAME_BYTES = 1 << 20  # bytes of a header with a long name: systems have names of 4 KB
MOST_HEADERS = 100  # successive headers of one member of a tar: writers make one or two
# A reader decodes a page of parquet at once. Writers make pages of 1 MB of captions, and pages of
# up to 1,024 pictures, which compression makes hardly smaller.
MOST_PAGE_BYTES = 64 << 20  # bytes of a decompressed page, unless it is large in the file too ...
MOST_PAGE_EXPANSION = 20  # ... and then at most this many times its size there
MOST_BATCH_BYTES = 128 << 20  # bytes of the rows of parquet that are decoded at once
MOST_PAGE_VALUES = 1 << 24  # values of a page: a row of five captions has five values
ROWS_BEYOND_BYTES = 100_000  # announced rows of parquet beyond one for each byte
