"""Names of folders that shells, globs, URLs and templates take for something else."""

# One with all of it, for tests that can afford one folder.
ODD = "x [v2] *? 50%20 #1 &; ü猫 'q' {a,b} $HOME."

NAMES = (
    ODD, "with spaces", " at the ends ", "x [v2]", "[!a]", "a*", "a?b", "**", "50%", "%41", "a#b",
    "a&b;c", "ünïcödé", "日本語", "e\u0301", "dot.", "..x", "~", "-z", "a:b,c", "{a,b}", "$HOME",
    "'", '"q"', "new\nline", "a@2", "!x",
)  # fmt: skip
