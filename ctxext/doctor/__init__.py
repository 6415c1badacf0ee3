"""What is wrong in the environment or in a model, and what helps: findings, each ok, a warning or a failure."""
