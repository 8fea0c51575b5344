"""What `python -m stamp_fast demo` runs: glyphs, a network pretrained on them, digits, and the comparison."""
