"""Optimizers that train to an exact sparsity, and the call that sets one up for a model."""
