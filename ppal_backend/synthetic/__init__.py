"""Generated detection sets: glyphs on photographs, long-tailed, with look-alikes and near-duplicates."""
