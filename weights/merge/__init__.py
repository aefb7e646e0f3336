"""Merging LoRAs: ZipRank's masks over ranks, and the baselines, one method a file."""
