"""What kvfs knows of its blocks, in SQLite. Knows nothing of the files of tiers."""
