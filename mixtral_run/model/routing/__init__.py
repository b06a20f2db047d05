"""The router and its layer; counts of the experts' tokens, and the loss of their balance."""
