"""What a filesystem does with blocks: names, opening, bytes, attributes, checks."""
