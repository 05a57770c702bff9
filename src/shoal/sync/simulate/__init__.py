"""Asynchrony simulated: the sync code itself, driven by a logical clock, with speeds, delays, losses and crashes."""
