"""Decoupled weight decay, seen: trains grids of networks on scikit-learn's digits and draws what they say."""
