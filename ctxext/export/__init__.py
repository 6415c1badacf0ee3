"""Export of a finished model to other programs: what they support of its layout, and the directory for them."""
