"""Merging LoRAs with the model at hand: calibration, training, reports as pictures."""
