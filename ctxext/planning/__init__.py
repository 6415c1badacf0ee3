"""Time and memory of a run on a GPU, and the options that make it fit and fast: arithmetic on plans. No torch."""
