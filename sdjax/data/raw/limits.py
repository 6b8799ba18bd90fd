"""How much of a stranger's file is read. docs/prepare.md has the same table.

All are far beyond what honest data has, and are there so that one small file cannot take all memory
or all time of a machine. A row beyond one is skipped and counted, a shard read up to there.
"""

from sdjax.data.image_files import MOST_BYTES

MOST_PICTURE_BYTES = MOST_BYTES  # of an encoded picture
MOST_CAPTION_CHARS = 100_000  # of a caption: text encoders read some 77 to 512 tokens of it
MOST_CAPTION_BYTES = 4 * MOST_CAPTION_CHARS  # of a file that is one, in UTF-8
MOST_ROW_BYTES = 4 << 20  # of a line of JSON, a row of CSV, the .json of a tar, a cell of parquet
MOST_WHOLE_BYTES = 64 << 20  # of metadata read as a whole: a JSON array, UTF-16 and UTF-32
MOST_NAME_CHARS = 4096  # of a file_name, as long as a path of Linux
# A tar is all headers of 512 bytes and padding, which gzip makes 20 times smaller; pictures it
# hardly makes smaller at all.
MOST_EXPANSION = 100  # bytes that come of each byte of a gzip file ...
EXPANSION_SLACK = 64 << 20  # ... and so many besides
MOST_NAME_BYTES = 1 << 20  # of a header that holds a long name: systems have names of 4 KB
MOST_HEADERS = 100  # in a row that tell of one member of a tar: writers make one or two
# A page of parquet is what a reader decodes at once. Writers make pages of 1 MB of captions, and of
# pictures up to 1,024 in one page, which do not get much smaller by compression.
MOST_PAGE_BYTES = 64 << 20  # of a page, decompressed, unless it is as large in the file ...
MOST_PAGE_EXPANSION = 20  # ... but for so many times
MOST_BATCH_BYTES = 128 << 20  # of the rows of parquet that are decoded at once
MOST_PAGE_VALUES = 1 << 24  # of a page: a row of five captions has five values
ROWS_BEYOND_BYTES = 100_000  # rows of parquet that are announced beyond one for each byte
