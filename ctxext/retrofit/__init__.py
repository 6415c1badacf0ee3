"""Layer selection before training and tuning after it: decisions based on measurements."""
