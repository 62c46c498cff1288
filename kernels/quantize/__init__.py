"""How one matrix becomes four bits: rounding, clipping, error feedback, what the rest can mend."""
