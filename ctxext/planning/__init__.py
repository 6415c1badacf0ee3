"""What a run would take on a card, and which knobs make it fit and fast: arithmetic on plans, without torch."""
