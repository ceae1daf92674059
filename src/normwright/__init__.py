"""Normalization in PyTorch networks: fast, correct and understood."""
