"""Floor 4: text to tokens. Documents, packing, the embedded corpus, and the passkey haystack."""
