"""Training on preferences: losses, the reference's log-probabilities, and how the step takes both."""
